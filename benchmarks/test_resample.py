"""resample2x with the published filters: 2 bytes per element of x and of y (bfloat16)."""

from collections.abc import Callable, Sequence

from fastgan_kernels import resample2x
from fastgan_kernels.resample import resample2x_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from benchmarks.measure import DTYPE


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    s = case.shape
    return {"x": normal(case.batch, s.cin, s.size, s.size).requires_grad_()}


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(t["x"], case.network.filter, up=case.shape.resample == "up")


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """Every element of the small and the large map once, whichever way."""
    change = 4 if case.shape.resample == "up" else 0.25
    return [(DTYPE.itemsize * case.batch * case.channels * case.pixels * (1 + change), 0)]


OP = Op("resample2x", inputs, call, resample2x, resample2x_ref, parts)


def test_resample2x(bench: Callable[[], None]) -> None:
    bench()
