"""norm_silu_conv: GroupNorm, SiLU and a frozen 3 x 3 convolution."""

from collections.abc import Callable

from fastgan_kernels import norm_silu_conv
from fastgan_kernels.norm_silu_conv import norm_silu_conv_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Normal, Op, kernel, norm_parameters, training
from benchmarks.measure import DTYPE


def inputs(case: Case, normal: Normal) -> Inputs:
    """All but the convolution trains. A block's second convolution has embedding and residual."""
    s, n = case.shape, case.batch
    trains = {"x": normal(n, s.cin, s.size, s.size, std=2) + 0.5}
    trains["norm_weight"], trains["norm_bias"] = norm_parameters(normal, s.cin)
    trains |= {name: normal(n, s.cin, std=0.5) for name in s.embedding.split()}
    if s.embedding:
        trains["residual"] = normal(n, s.cout, s.size, s.size)
    return training(trains) | {"weight": kernel(normal, s.cin, s.cout), "bias": normal(s.cout)}


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(num_groups=32, eps=1e-5, gain=0.5**0.5 if case.shape.embedding else 1.0, **t)


def floor(case: Case, direction: str) -> tuple[float, float]:
    """Forward x, y and the residual; backward x, dx, dy and, of another scale, the residual's."""
    s, pixels = case.shape, case.batch * case.pixels
    of_x, of_y = 1 if direction == "forward" else 2, 2 if s.embedding else 1
    taps = 9 * s.cin * s.cout
    return DTYPE.itemsize * (pixels * (of_x * s.cin + of_y * s.cout) + taps), 2 * pixels * taps


# Our convolution also where no table says that it is faster than cuDNN's behind the norm.
TRITON = {"triton": "triton,norm_silu_conv=triton"}
OP = Op("norm_silu_conv", inputs, call, norm_silu_conv, norm_silu_conv_ref, floor, TRITON)


def test_norm_silu_conv(bench: Callable[[], None]) -> None:
    bench()
