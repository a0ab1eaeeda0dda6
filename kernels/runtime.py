"""How kernels start: Triton where it exists, its interpreter on the CPU, or a recording.

`python -m kernels.aot` records what the launchers would start on a GPU (tensors on the meta device)
and compiles exactly that, so that no second list of signatures can fall out of step.
"""

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl
else:  # aarch64 and others for which no wheel exists: the kernels stay plain, uncallable functions
    triton = SimpleNamespace(jit=lambda fn: fn)
    tl = SimpleNamespace(constexpr=object, dtype=object)

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on CPU tensors, slowly; decided when they are first imported, as Triton does."""


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


def descriptor(x: Any, shape: list[int], block: list[int]) -> Any:
    """Triton's descriptor (TMA on sm_90) of a dense tensor taken as `shape`, in tiles of `block`.

    The last side of the shape in bytes, and x's address, are multiples of 16.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return TensorDescriptor(x, shape, strides, block)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside instead of starting them."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
