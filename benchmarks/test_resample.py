"""resample2x: EDM's up- and downsampling."""

from collections.abc import Callable

from fastgan_kernels import resample2x
from fastgan_kernels.resample import resample2x_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Normal, Op, training
from benchmarks.measure import DTYPE


def inputs(case: Case, normal: Normal) -> Inputs:
    s = case.shape
    return training({"x": normal(case.batch, s.cin, s.size, s.size)})


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(t["x"], case.network.filter, up=case.shape.resample == "up")


def floor(case: Case, direction: str) -> tuple[float, float]:
    """Every element of the small and the large map once, whichever way."""
    change = 4 if case.shape.resample == "up" else 0.25
    return DTYPE.itemsize * case.batch * case.channels * case.pixels * (1 + change), 0


OP = Op("resample2x", inputs, call, resample2x, resample2x_ref, floor)


def test_resample(bench: Callable[[], None]) -> None:
    bench()
