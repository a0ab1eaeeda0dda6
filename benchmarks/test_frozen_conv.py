"""frozen_conv2d: the library's convolution that keeps no input."""

from collections.abc import Callable

from fastgan_kernels import frozen_conv2d
from fastgan_kernels.frozen_conv import frozen_conv2d_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Normal, Op, kernel
from benchmarks.measure import DTYPE


def inputs(case: Case, normal: Normal) -> Inputs:
    """Only the input wants a gradient."""
    s = case.shape
    x = normal(case.batch, s.cin, s.size, s.size).requires_grad_()
    return {"x": x, "weight": kernel(normal, s.cin, s.cout, s.kernel), "bias": normal(s.cout)}


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(**t, padding=case.shape.kernel // 2)


def floor(case: Case, direction: str) -> tuple[float, float]:
    """The same in both directions: every tensor once, 2 Cin k^2 FLOP per element of y."""
    s, pixels = case.shape, case.batch * case.pixels
    taps = s.cin * s.cout * s.kernel**2
    return DTYPE.itemsize * (pixels * (s.cin + s.cout) + taps), 2 * pixels * taps


OP = Op("frozen_conv2d", inputs, call, frozen_conv2d, frozen_conv2d_ref, floor)


def test_frozen_conv(bench: Callable[[], None]) -> None:
    bench()
