"""The one place that sets arithmetic for the whole process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def strict_float32() -> None:
    """float32 means float32: no TF32 in matrix products and convolutions (cuDNN's default is TF32).

    Published training and evaluation ran like this.
    """
    _allow_tf32(False)


def tensor_float32() -> None:
    """What is float32 is multiplied on tensor cores, with mantissas of 10 bits."""
    _allow_tf32(True)


@contextmanager
def strict_within() -> Iterator[None]:
    """Within, strict float32 whatever holds outside: what is measured must not depend on it."""
    before = torch.backends.cuda.matmul.allow_tf32
    strict_float32()
    try:
        yield
    finally:
        _allow_tf32(before)


def tuned_convolutions() -> None:
    """Lets cuDNN try its algorithms at every new shape and keep the fastest, as published.

    For training, whose batches have one shape; sampling and evaluation end with a smaller one.
    """
    torch.backends.cudnn.benchmark = True


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
