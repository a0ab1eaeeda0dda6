"""resample2x with the published filters: 2 bytes per element of x and of y (bfloat16).

`published` convolves also where two taps are but a mean or a repetition, as the authors' code does.
"""

from collections.abc import Callable, Sequence

import pytest
from fastgan_kernels import resample2x
from fastgan_kernels.resample import resample2x_ref
from torch import Tensor

from benchmarks import plain
from benchmarks.cases import Case, Resampling
from benchmarks.measure import DTYPE, seconds
from benchmarks.op import Inputs, Op

pytestmark = pytest.mark.benchmark(timer=seconds, disable_gc=True)


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    r = _shape(case)
    x = normal(case.batch, r.channels, r.size, r.size).requires_grad_()
    return {"x": x, "taps": plain.taps(case.network.filter, r.channels, x)}


def eager(case: Case, t: Inputs) -> Tensor:
    return plain.resampled(t["x"], t["taps"], _shape(case).direction)


def published(case: Case, t: Inputs) -> Tensor:
    return plain.convolved(t["x"], t["taps"], _shape(case).direction)


def ours(case: Case, t: Inputs) -> Tensor:
    return resample2x(t["x"], case.network.filter, up=_shape(case).direction == "up")


def exact(case: Case, t: Inputs) -> Tensor:
    return resample2x_ref(t["x"], case.network.filter, up=_shape(case).direction == "up")


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """Every element of the small and the large map once, whichever way."""
    change = 4 if _shape(case).direction == "up" else 0.25
    elements = case.batch * case.channels * case.pixels * (1 + change)
    return [(DTYPE.itemsize * elements, 0)]


def _shape(case: Case) -> Resampling:
    assert isinstance(case.shape, Resampling)
    return case.shape


CANDIDATES = {"eager": eager, "published": published, "ours": ours}
OP = Op("resample2x", inputs, CANDIDATES, exact, parts)


@pytest.mark.parametrize(("candidate", "direction"), OP.runs)
@pytest.mark.parametrize("case", OP.cases, ids=str)
def test_resample2x(bench: Callable, case: Case, candidate: str, direction: str) -> None:
    bench(OP, case, candidate, direction)
