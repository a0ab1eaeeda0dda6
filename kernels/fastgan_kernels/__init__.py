"""Fused operations for the frozen UNet of a GAN fine-tune; tensors only, nothing of networks.

Each op has a plain PyTorch definition (`<op>_ref`), a Triton kernel where that pays, and a public
function that checks its arguments and asks `dispatch` which of them to run. All ops take
bfloat16, float16 or float32, accumulate in float32 and give the same bits every time.
"""

from fastgan_kernels.attention import Attention, Conv, Norm
from fastgan_kernels.frozen_block import frozen_unet_block
from fastgan_kernels.frozen_conv import frozen_conv2d
from fastgan_kernels.norm_silu import group_norm_silu
from fastgan_kernels.norm_silu_conv import norm_silu_conv
from fastgan_kernels.resample import resample2x
from fastgan_kernels.resize_normalize import resize_normalize

__all__ = [
    "Attention",
    "Conv",
    "Norm",
    "frozen_conv2d",
    "frozen_unet_block",
    "group_norm_silu",
    "norm_silu_conv",
    "resample2x",
    "resize_normalize",
]
