"""frozen_conv2d: cuDNN's convolution, which here keeps nothing for backward."""

from collections.abc import Callable, Sequence

from fastgan_kernels import frozen_conv2d
from fastgan_kernels.frozen_conv import frozen_conv2d_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from benchmarks.measure import DTYPE


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    """Only the input wants a gradient."""
    s = case.shape
    return {
        "x": normal(case.batch, s.cin, s.size, s.size).requires_grad_(),
        "weight": normal(s.cout, s.cin, s.kernel, s.kernel, std=(s.cin * s.kernel**2) ** -0.5),
        "bias": normal(s.cout),
    }


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(**t, padding=case.shape.kernel // 2)


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """The same in both directions: every tensor once, 2 Cin k^2 FLOP per element of y."""
    s, pixels = case.shape, case.batch * case.pixels
    taps = s.cin * s.cout * s.kernel**2
    return [(DTYPE.itemsize * (pixels * (s.cin + s.cout) + taps), 2 * pixels * taps)]


OP = Op("frozen_conv2d", inputs, call, frozen_conv2d, frozen_conv2d_ref, parts)


def test_frozen_conv2d(bench: Callable[[], None]) -> None:
    bench()
