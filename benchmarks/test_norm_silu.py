"""group_norm_silu: 4 bytes per element forward, 6 backward (bfloat16).

`apex` is NVIDIA's NHWC group norm, where it is installed; for channels that it has no kernel for
(192, 576, 1152) it does what it does, which may be PyTorch's.
"""

from collections.abc import Callable, Sequence

import torch
from fastgan_kernels import group_norm_silu
from fastgan_kernels.dispatch import apex_group_norm_class
from fastgan_kernels.norm_silu import group_norm_silu_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from benchmarks.measure import DTYPE, ON_GPU


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    """Parameters of norms are float32 masters; all of them train."""
    n, channels, size = case.batch, case.channels, case.shape.size
    found = {
        "x": normal(n, channels, size, size, std=2) + 0.5,
        "weight": 1 + normal(channels, std=0.3, dtype=torch.float32),
        "bias": normal(channels, std=0.3, dtype=torch.float32),
    }
    found |= {name: normal(n, channels, std=0.5) for name in case.shape.embedding.split()}
    return {name: value.requires_grad_() for name, value in found.items()}


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(num_groups=32, act=case.shape.act, **t)


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """One pass: x and y; x, dy and dx."""
    elements = case.batch * case.channels * case.pixels
    return [({"forward": 2, "backward": 3}[direction] * DTYPE.itemsize * elements, 0)]


APEX = {"apex": "group_norm_silu=apex"} if ON_GPU and apex_group_norm_class() else {}
OP = Op("group_norm_silu", inputs, call, group_norm_silu, group_norm_silu_ref, parts, APEX)


def test_group_norm_silu(bench: Callable[[], None]) -> None:
    bench()
