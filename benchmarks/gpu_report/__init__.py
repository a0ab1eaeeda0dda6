"""What a bare GPU machine should tell, measured in parts that stop and resume: tools/gpu_report.py.

Every case of a part is a process of its own and one JSON file; what is finished is not repeated.
"""
