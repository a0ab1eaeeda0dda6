"""The yardstick of the kernel tests: as accurate as plain PyTorch in the same dtype.

An op passes when its error against float64 is at most twice that of the same mathematics written
in plain PyTorch in the op's own dtype, plus a floor: one rounding of the result and four of float32
on the way there, relative to the largest value (a plain computation can be exact by luck; rstd, the
sigmoid, a product and a sum are each rounded in any order of evaluation).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from fastgan_kernels import dispatch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter gets bfloat16 wrong: it is tested where there is a GPU.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def assert_as_accurate(
    ours: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    largest: bool = True,
) -> None:
    """Compares every result by its root-mean-square and (unless not `largest`) largest error."""
    assert ours.keys() == plain.keys() == exact.keys()
    for name, result in ours.items():
        truth = exact[name].double()
        assert result.shape == truth.shape, (name, result.shape, truth.shape)
        assert result.isfinite().all(), f"{name} is not finite"
        rounding = torch.finfo(result.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        for norm in (_root_mean_square, _largest)[: 1 + largest]:
            error, allowed = norm(result - truth), 2 * norm(plain[name] - truth)
            allowed += rounding * norm(truth)
            assert error <= allowed, f"{name}: {norm.__name__} error {error:.3g} > {allowed:.3g}"


def gradients(outputs: Sequence[Tensor], inputs: Mapping[str, Tensor], seed: int = 7) -> dict:
    """The gradients of a random linear function of `outputs` for every input, by name."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for y in outputs:
        probe = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)
        # The probe is rounded to the output's dtype by autograd: round it for all dtypes alike.
        loss = loss + (y.double() * probe.half().double()).sum()
    found = torch.autograd.grad(loss, list(inputs.values()))
    return {f"grad {name}": g for name, g in zip(inputs, found, strict=True)}


def results(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    trains: Iterable[str] | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """The output and the gradients of the inputs (of those named in `trains`), by name.

    The leaves are strided as the inputs are.
    """
    names = set(inputs if trains is None else trains)
    given = {k: v.detach().requires_grad_(k in names) for k, v in inputs.items()}
    y = function(**given, **options)
    return {"y": y, **gradients([y], {k: v for k, v in given.items() if k in names})}


def plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same op by PyTorch's own operators."""

    def run(**arguments: object) -> Tensor:
        before = dispatch._configured
        dispatch.use("library")
        try:
            return function(**arguments)
        finally:
            dispatch.use(before)

    return run


def check(
    function: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    trains: Iterable[str] | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """Holds an op to the yardstick; its results."""
    double = {name: value.double() for name, value in inputs.items()}
    exact = results(definition, double, trains, **options)
    ours = results(function, inputs, trains, **options)
    assert_as_accurate(ours, results(plain(function), inputs, trains, **options), exact)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    return ours


def _largest(error: Tensor) -> float:
    return float(error.detach().double().abs().max()) if error.numel() else 0.0


def _root_mean_square(error: Tensor) -> float:
    return float(error.detach().double().square().mean().sqrt()) if error.numel() else 0.0
