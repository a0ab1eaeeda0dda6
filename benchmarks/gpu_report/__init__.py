"""What a bare GPU machine should tell, in cases that stop and resume: tools/gpu_report.py."""
