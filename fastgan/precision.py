"""The one place that sets arithmetic precision for the whole process."""

import torch


def strict_float32() -> None:
    """float32 means float32: no TF32 in matrix products and convolutions (cuDNN's default is TF32).

    Published training and evaluation ran like this.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
