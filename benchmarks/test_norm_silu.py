"""group_norm_silu: one read and one write of the map forward, two reads and one write backward."""

from collections.abc import Callable

from fastgan_kernels import group_norm_silu
from fastgan_kernels.dispatch import apex_group_norm_class
from fastgan_kernels.norm_silu import group_norm_silu_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Normal, Op, norm_parameters, training
from benchmarks.measure import DTYPE, ON_GPU


def inputs(case: Case, normal: Normal) -> Inputs:
    n, channels, size = case.batch, case.channels, case.shape.size
    weight, bias = norm_parameters(normal, channels)
    found = {"x": normal(n, channels, size, size, std=2) + 0.5, "weight": weight, "bias": bias}
    found |= {name: normal(n, channels, std=0.5) for name in case.shape.embedding.split()}
    return training(found)


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(num_groups=32, act=case.shape.act, **t)


def floor(case: Case, direction: str) -> tuple[float, float]:
    """One pass: x and y; x, dy and dx."""
    maps = {"forward": 2, "backward": 3}[direction]
    return maps * DTYPE.itemsize * case.batch * case.channels * case.pixels, 0


# For channels that it has no kernel for, apex does what it does, which may be PyTorch's.
APEX = {"apex": "group_norm_silu=apex"} if ON_GPU and apex_group_norm_class() else {}
OP = Op("group_norm_silu", inputs, call, group_norm_silu, group_norm_silu_ref, floor, APEX)


def test_norm_silu(bench: Callable[[], None]) -> None:
    bench()
