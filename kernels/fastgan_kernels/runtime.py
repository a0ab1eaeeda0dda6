"""What every op is made of: how its kernels start, what its arguments must be, NHWC memory.

Kernels run by Triton where it exists, on the CPU in its interpreter, or are only recorded:
`python -m fastgan_kernels.aot` records what the launchers would start on a GPU (meta tensors) and
compiles exactly that, so that no second list of signatures can fall out of step.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, channels_last

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl
else:  # aarch64 and others for which no wheel exists: the kernels stay plain, uncallable functions
    triton = SimpleNamespace(jit=lambda fn: fn)
    tl = SimpleNamespace(constexpr=object, dtype=object)

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on CPU tensors, slowly; decided when they are first imported, as Triton does."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute in; float64 is for checking, by the definitions."""


@dataclass(frozen=True)
class Launch:
    """One kernel start: its run-time arguments in order, its constexprs, warps and stages."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int | None = None
    """Loads in flight of a pipelined loop; None leaves it to Triton."""


_recorders: list[list[Launch]] = []


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    num_stages: int | None = None,
    **constants: Any,
) -> None:
    """Starts `kernel` on `grid` programs; under `recording` only notes what would start.

    `args`: tensors (or None), integers and floats in the kernel's order; `constants`: constexprs.
    """
    if _recorders:
        _recorders[-1].append(Launch(kernel, args, constants, num_warps, num_stages))
        return
    stages = {} if num_stages is None else {"num_stages": num_stages}
    kernel[grid](*args, **constants, num_warps=num_warps, **stages)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside instead of starting them."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


def descriptor(x: Any, shape: list[int], block: list[int]) -> Any:
    """Triton's descriptor (TMA on sm_90) of a dense tensor taken as `shape`, in tiles of `block`.

    The last side of the shape in bytes, and x's address, are multiples of 16.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return TensorDescriptor(x, shape, strides, block)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` of torch.float16."""
    return str(dtype).removeprefix("torch.")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """ValueError unless the dtype is one that the ops compute in."""
    allowed = (*FLOATS, torch.float64)
    if dtype not in allowed:
        names = ", ".join(map(dtype_name, allowed))
        raise ValueError(f"{name} is {dtype}, one of {names} would do")


def check_image(name: str, x: Tensor) -> None:
    """ValueError unless x is a non-empty [N, C, H, W] of an allowed dtype."""
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"{name} has shape {list(x.shape)}, non-empty [N, C, H, W] would do")
    check_dtype(name, x.dtype)


def check_groups(name: str, groups: int, x: Tensor) -> None:
    """ValueError unless the channels of x split into `groups` equal groups."""
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{name} {groups} does not divide the {channels} channels of x")


def check_tensor(name: str, value: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """ValueError unless `value` is None or has `shape` (1 in front is broadcast) beside `like`."""
    if value is None:
        return
    check_dtype(name, value.dtype)
    broadcast = len(shape) > 1 and tuple(value.shape) == (1, *shape[1:])
    if tuple(value.shape) != tuple(shape) and not broadcast:
        raise ValueError(f"{name} has shape {list(value.shape)}, {list(shape)} would fit x")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, x on {like.device}, one device would do")


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


def empty_image(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory for [N, C, H, W] in NHWC, in the dtype of `like` unless another is given."""
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=channels_last)


def rows(value: Tensor | None) -> Tensor | None:
    """[N, C] with dense rows: the rows may be apart (a chunk) or one and the same (expanded)."""
    return value if value is None or value.stride(1) == 1 else value.contiguous()
