"""norm_silu_conv: the convolutions of a block with the norm in front of them.

`ours` is what dispatch takes, cuDNN's convolution behind group_norm_silu unless a table says
otherwise; `triton` the fastest of our plans, or the first where none was measured (`python -m
fastgan_kernels.tune` measures all). A block's second convolution has the embedding and the
residual.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from fastgan_kernels import dispatch, norm_silu_conv
from fastgan_kernels.norm_silu_conv import norm_silu_conv_ref
from torch import Tensor
from torch.nn import functional as F

from benchmarks import plain
from benchmarks.cases import Case, NormConv
from benchmarks.measure import DTYPE, seconds
from benchmarks.op import Inputs, Op

pytestmark = pytest.mark.benchmark(timer=seconds, disable_gc=True)
GROUPS = 32
FROZEN = ("weight", "bias")


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    """Parameters of norms are float32 masters; all but the convolution's train."""
    c, n = _shape(case), case.batch
    found = {
        "x": normal(n, c.cin, c.size, c.size, std=2) + 0.5,
        "norm_weight": 1 + normal(c.cin, std=0.3, dtype=torch.float32),
        "norm_bias": normal(c.cin, std=0.3, dtype=torch.float32),
        "weight": normal(c.cout, c.cin, 3, 3, std=(9 * c.cin) ** -0.5),
        "bias": normal(c.cout),
    }
    found |= {name: normal(n, c.cin, std=0.5) for name in c.embedding.split()}
    if c.embedding:
        found["residual"] = normal(n, c.cout, c.size, c.size)
    return {name: value.requires_grad_(name not in FROZEN) for name, value in found.items()}


def eager(case: Case, t: Inputs) -> Tensor:
    embedding = {name: t[name] for name in _shape(case).embedding.split()}
    s = plain.norm_silu(t["x"], t["norm_weight"], t["norm_bias"], groups=GROUPS, **embedding)
    y = F.conv2d(s, t["weight"], t["bias"], padding=1)
    return (y + t["residual"]) * _gain(case) if "residual" in t else y


def ours(case: Case, t: Inputs) -> Tensor:
    return norm_silu_conv(num_groups=GROUPS, eps=1e-5, gain=_gain(case), **t)


def exact(case: Case, t: Inputs) -> Tensor:
    return norm_silu_conv_ref(num_groups=GROUPS, eps=1e-5, gain=_gain(case), **t)


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """What no implementation can do without: every tensor once, 18 Cin FLOP per element of y.

    Forward x, y and the residual; backward x, dx, dy and, of another scale, the residual's.
    """
    c, pixels = _shape(case), case.batch * case.pixels
    of_y = 2 if c.embedding else 1
    of_x = 1 if direction == "forward" else 2
    taps = 9 * c.cin * c.cout
    moved = DTYPE.itemsize * (pixels * (of_x * c.cin + of_y * c.cout) + taps)
    return [(moved, 2 * pixels * taps)]


def _shape(case: Case) -> NormConv:
    assert isinstance(case.shape, NormConv)
    return case.shape


def _gain(case: Case) -> float:
    return 0.5**0.5 if _shape(case).embedding else 1.0


OP = Op("norm_silu_conv", inputs, {"eager": eager, "ours": ours, "triton": ours}, exact, parts)


@pytest.mark.parametrize(("candidate", "direction"), OP.runs)
@pytest.mark.parametrize("case", OP.cases, ids=str)
def test_norm_silu_conv(bench: Callable, case: Case, candidate: str, direction: str) -> None:
    dispatch.use("triton,norm_silu_conv=triton" if candidate == "triton" else "triton")
    bench(OP, case, candidate, direction)
