"""norm_silu_conv: the convolutions of a block with the norm in front of them.

`ours` is what dispatch takes, cuDNN's convolution behind group_norm_silu unless a table says
otherwise; `triton` the fastest of our plans, or the first where none was measured (`python -m
fastgan_kernels.tune` measures all). A block's second convolution has the embedding and the
residual.
"""

from collections.abc import Callable, Sequence

import torch
from fastgan_kernels import norm_silu_conv
from fastgan_kernels.norm_silu_conv import norm_silu_conv_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from benchmarks.measure import DTYPE

FROZEN = ("weight", "bias")


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    """Parameters of norms are float32 masters; all but the convolution's train."""
    s, n = case.shape, case.batch
    found = {
        "x": normal(n, s.cin, s.size, s.size, std=2) + 0.5,
        "norm_weight": 1 + normal(s.cin, std=0.3, dtype=torch.float32),
        "norm_bias": normal(s.cin, std=0.3, dtype=torch.float32),
        "weight": normal(s.cout, s.cin, 3, 3, std=(9 * s.cin) ** -0.5),
        "bias": normal(s.cout),
    }
    found |= {name: normal(n, s.cin, std=0.5) for name in s.embedding.split()}
    if s.embedding:
        found["residual"] = normal(n, s.cout, s.size, s.size)
    return {name: value.requires_grad_(name not in FROZEN) for name, value in found.items()}


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(num_groups=32, eps=1e-5, gain=0.5**0.5 if case.shape.embedding else 1.0, **t)


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """Forward x, y and the residual; backward x, dx, dy and, of another scale, the residual's."""
    s, pixels = case.shape, case.batch * case.pixels
    of_x, of_y = 1 if direction == "forward" else 2, 2 if s.embedding else 1
    taps = 9 * s.cin * s.cout
    return [(DTYPE.itemsize * (pixels * (of_x * s.cin + of_y * s.cout) + taps), 2 * pixels * taps)]


TRITON = {"triton": "triton,norm_silu_conv=triton"}
OP = Op("norm_silu_conv", inputs, call, norm_silu_conv, norm_silu_conv_ref, parts, TRITON)


def test_norm_silu_conv(bench: Callable[[], None]) -> None:
    bench()
