"""How norm_silu_conv may run in one direction: the plans that are measured against each other.

`python -m fastgan_kernels.tune` times these on a GPU, table.py remembers which won where.
All of them compile for their architecture without spilling a register; triton 3.6 spills 8 bytes
in two input gradients that no published block has, 1 x 1 and float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastgan_kernels.runtime import next_power_of_2

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
Architecture = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """A program's tile and how it is filled.

    form: library (cuDNN and the norm's own kernels), fused (the loop normalises what it loads;
    backward, the epilogue has SiLU' and the norm's sums), behind (forward only: the norm's kernel
    writes the activations, the epilogue adds and sums up).
    m, n, k: pixels, channels of the result, channels summed over in a step. descriptors: tensor
    descriptors (TMA on sm_90) fetch boxes of whole image rows, which come padded with zeros; else
    pointers. tanh: SiLU by the hardware's approximation (2^-11), one special function in place of
    two.
    """

    form: Literal["library", "fused", "behind"] = "library"
    m: int = 0
    n: int = 0
    k: int = 0
    warps: int = 0
    stages: int = 0
    descriptors: bool = False
    tanh: bool = False

    def __str__(self) -> str:
        if self.form == "library":
            return "library"
        words = [self.form, f"{self.m}x{self.n}x{self.k}", f"w{self.warps}", f"s{self.stages}"]
        words += [name for name in ("descriptors", "tanh") if getattr(self, name)]
        return " ".join(words)


LIBRARY = Plan()


@dataclass(frozen=True)
class Shape:
    """A convolution [N, cin, height, width] -> cout channels, stride 1, kernel 1 or 3."""

    cin: int
    cout: int
    height: int
    width: int
    kernel: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def channels(self, direction: Direction) -> tuple[int, int]:
        """Of what is convolved, and of the result."""
        return (self.cin, self.cout) if direction == "forward" else (self.cout, self.cin)


# The first of a list is what norm_silu_conv=triton takes where nothing was measured.
_SIXTEEN_BITS: dict[tuple[Architecture, Direction], tuple[Plan, ...]] = {
    ((8, 0), "forward"): (
        Plan("fused", 128, 256, 32, 8, 3, tanh=True),
        Plan("fused", 128, 256, 32, 8, 3),
        Plan("fused", 128, 128, 32, 8, 3, tanh=True),
        Plan("behind", 128, 256, 32, 8, 3),
        Plan("behind", 128, 128, 32, 4, 4),
    ),
    ((8, 0), "backward"): (
        Plan("fused", 128, 128, 64, 8, 3),
        Plan("fused", 128, 64, 64, 8, 3),
        Plan("fused", 64, 64, 64, 4, 3),
    ),
    ((9, 0), "forward"): (
        Plan("fused", 128, 256, 64, 8, 3, descriptors=True, tanh=True),
        Plan("fused", 128, 256, 64, 8, 3, descriptors=True),
        Plan("fused", 128, 256, 32, 8, 4, tanh=True),
        Plan("fused", 64, 256, 64, 4, 3, descriptors=True, tanh=True),
        Plan("behind", 128, 256, 64, 8, 4, descriptors=True),
        Plan("behind", 128, 128, 64, 4, 4, descriptors=True),
    ),
    ((9, 0), "backward"): (
        Plan("fused", 128, 128, 64, 8, 3, descriptors=True),
        Plan("fused", 64, 128, 64, 4, 4, descriptors=True),
        Plan("fused", 128, 64, 64, 8, 3),
    ),
}
# Without tensor cores, which would multiply float32 as TF32.
_FLOAT32 = Plan("fused", 32, 64, 16, 4, 2)


def candidates(
    architecture: Architecture, dtype: torch.dtype, direction: Direction, shape: Shape
) -> Iterator[Plan]:
    """What can run there, cut to small images and few channels; the untested default first."""
    plans: tuple[Plan, ...] = (_FLOAT32,)
    if dtype.itemsize == 2:
        plans = _SIXTEEN_BITS.get((architecture, direction), _SIXTEEN_BITS[(8, 0), direction])
    yield from dict.fromkeys(fitted(plan, direction, shape) for plan in plans)


def fitted(plan: Plan, direction: Direction, shape: Shape) -> Plan:
    """The plan with a tile no larger than the image, and by pointers where descriptors cannot."""
    depth, channels = shape.channels(direction)
    # On images of fewer pixels half the warps, four of which multiply 64 rows on sm_90; each would
    # hold twice as much of the weight.
    part = 1 if shape.pixels > plan.m // 2 or plan.warps <= 4 else 2
    m, n, k = (
        max(16, min(most, next_power_of_2(there)))
        for most, there in ((plan.m, shape.pixels), (plan.n // part, channels), (plan.k, depth))
    )
    # Boxes hold whole rows of the image, rows of memory multiples of 16 bytes.
    addressable = not (m % shape.width or depth % 8 or channels % 8)
    descriptors = plan.descriptors and addressable
    return replace(plan, m=m, n=n, k=k, warps=plan.warps // part, descriptors=descriptors)
