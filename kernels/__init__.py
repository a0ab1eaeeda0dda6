"""Fused operations for the frozen UNet of a GAN fine-tune; tensors only, nothing of networks.

Each op has a plain PyTorch definition (`<op>_ref`), a Triton kernel where that pays, and a public
function that checks its arguments and asks `kernels.dispatch` which of them to run. All ops take
and return channels_last tensors in bfloat16, float16 or float32, accumulate in float32 and give the
same bits every time.
"""
