"""frozen_conv2d: the library's convolution, and its input gradient in two ways.

`flipped` computes the input gradient as a forward convolution with the weight turned around.
"""

from collections.abc import Callable, Sequence

import pytest
from fastgan_kernels import frozen_conv2d
from fastgan_kernels.frozen_conv import flip_weight
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Case, Conv
from benchmarks.measure import DTYPE, seconds
from benchmarks.op import Inputs, Op

pytestmark = pytest.mark.benchmark(timer=seconds, disable_gc=True)


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    """Only the input wants a gradient."""
    c = _conv(case)
    weight = normal(c.cout, c.cin, c.kernel, c.kernel, std=(c.cin * c.kernel**2) ** -0.5)
    return {
        "x": normal(case.batch, c.cin, c.size, c.size).requires_grad_(),
        "weight": weight,
        "bias": normal(c.cout),
        "flipped": flip_weight(weight),
    }


def eager(case: Case, t: Inputs) -> Tensor:
    return F.conv2d(t["x"], t["weight"], t["bias"], padding=_conv(case).kernel // 2)


def ours(case: Case, t: Inputs) -> Tensor:
    return frozen_conv2d(t["x"], t["weight"], t["bias"], padding=_conv(case).kernel // 2)


def flipped(case: Case, t: Inputs) -> Tensor:
    padding = _conv(case).kernel // 2
    return frozen_conv2d(t["x"], t["weight"], t["bias"], padding=padding, flipped=t["flipped"])


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """The same in both directions: every tensor once, 2 Cin k^2 FLOP per element of y."""
    c, pixels = _conv(case), case.batch * case.pixels
    taps = c.cin * c.cout * c.kernel**2
    moved = DTYPE.itemsize * (pixels * (c.cin + c.cout) + taps)
    return [(moved, 2 * pixels * taps)]


def _conv(case: Case) -> Conv:
    assert isinstance(case.shape, Conv)
    return case.shape


OP = Op(
    "frozen_conv2d",
    inputs,
    {"eager": eager, "ours": ours, "flipped": flipped},
    eager,
    parts,
    directions={"flipped": ("backward",)},
)


@pytest.mark.parametrize(("candidate", "direction"), OP.runs)
@pytest.mark.parametrize("case", OP.cases, ids=str)
def test_frozen_conv2d(bench: Callable, case: Case, candidate: str, direction: str) -> None:
    bench(OP, case, candidate, direction)
