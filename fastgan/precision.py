"""The one place that sets arithmetic for the whole process."""

import torch


def strict_float32() -> None:
    """float32 means float32: no TF32 in matrix products and convolutions (cuDNN's default is TF32).

    Published training and evaluation ran like this.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def tuned_convolutions() -> None:
    """Lets cuDNN try its algorithms at every new shape and keep the fastest, as published.

    For training, whose batches have one shape; sampling and evaluation end with a smaller one.
    """
    torch.backends.cudnn.benchmark = True
