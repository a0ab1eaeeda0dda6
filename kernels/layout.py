"""Memory layouts that the kernels read, and the copies that bring others into them."""

from torch import Tensor, channels_last


def to_channels_last(x: Tensor) -> Tensor:
    """x itself when its memory is dense NHWC, else a copy that is."""
    # is_contiguous, then contiguous: sliced and NCHW tensors are copied, size-1 strides ignored.
    x = x.contiguous(memory_format=channels_last)
    _, c, h, w = x.shape
    if x.stride() == (h * w * c, 1, w * c, c):
        return x
    # One channel or one pixel: any strides count as channels_last, the kernels assume these.
    return x.as_strided(x.shape, (h * w * c, 1, w * c, c))


def channels_last_like(dy: Tensor, x: Tensor) -> Tensor:
    """An incoming gradient (expanded, NCHW, another dtype) in x's dtype and dense NHWC."""
    return to_channels_last(dy.to(x.dtype))


def rows(value: Tensor | None) -> Tensor | None:
    """[N, C] with dense rows: the rows may be apart (a chunk) or one and the same (expanded)."""
    return value if value is None or value.stride(1) == 1 else value.contiguous()
