"""Inputs of norm_silu_conv, its result and gradients, and the comparison with its definition."""

from collections.abc import Callable

import torch
from fastgan_kernels import dispatch
from fastgan_kernels.norm_silu_conv import norm_silu_conv, norm_silu_conv_ref
from oracle import DEVICE, assert_as_accurate, gradients
from torch import Tensor

ALL = "pre_shift scale shift residual"
FROZEN = ("weight", "bias")


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    features: str = ALL,
    mean: float = 0.5,
    std: float = 2.0,
) -> dict[str, Tensor]:
    """Inputs of the op by name; the norm's parameters are float32 masters, as in the networks."""
    n, cin, cout, h, w, k, _, _ = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        value = torch.randn(size, generator=generator).to(DEVICE)
        return value.to(memory_format=torch.channels_last) if len(size) == 4 else value

    inputs = {
        "x": (normal(n, cin, h, w) * std + mean).to(dtype),
        "norm_weight": 1 + 0.3 * normal(cin),
        "norm_bias": 0.3 * normal(cin),
        "weight": (normal(cout, cin, k, k) / (cin * k * k) ** 0.5).to(dtype),
        "bias": normal(cout).to(dtype),
    }
    for name in features.split():
        size = (n, cout, h, w) if name == "residual" else (n, cin)
        inputs[name] = 0.5 * normal(*size).to(dtype)
    return inputs


def run(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], groups: int, **options: object
) -> dict[str, Tensor]:
    """The output and the gradients of all inputs that may train, by name."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if k not in FROZEN}
    frozen = {name: inputs[name] for name in FROZEN if name in inputs}
    y = function(num_groups=groups, **leaves, **frozen, **{"eps": 1e-5, "gain": 0.7} | options)
    return {"y": y, **gradients([y], leaves)}


def plain(**arguments: object) -> Tensor:
    dispatch.use("library")
    y = norm_silu_conv(**arguments)  # type: ignore[arg-type]
    dispatch.use("triton,norm_silu_conv=triton")
    return y


def check(
    inputs: dict[str, Tensor],
    groups: int,
    function: Callable[..., Tensor] = norm_silu_conv,
    **options: object,
) -> None:
    double = {name: value.double() for name, value in inputs.items()}
    exact = run(norm_silu_conv_ref, double, groups, **options)
    ours = run(function, inputs, groups, **options)
    assert_as_accurate(ours, run(plain, inputs, groups, **options), exact)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
