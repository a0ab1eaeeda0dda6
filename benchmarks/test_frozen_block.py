"""frozen_unet_block without attention, and what each candidate keeps for backward."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.cases import Case
from benchmarks.measure import DTYPE, seconds
from benchmarks.op import Inputs, Op
from kernels.attention import Conv, Norm
from kernels.frozen_block import frozen_unet_block, frozen_unet_block_ref
from kernels.shapes import Block

pytestmark = pytest.mark.benchmark(timer=seconds, disable_gc=True)


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    """What a D2O-F fine-tune trains (norms, embedding, skip) and the frozen convolutions."""
    b, n = _block(case), case.batch
    masters = {"std": 0.3, "dtype": torch.float32}
    trains = {"x": normal(n, b.cin, b.size, b.size)}
    for i, channels in enumerate((b.cin, b.cout)):
        trains[f"norm{i}.weight"] = 1 + normal(channels, **masters)
        trains[f"norm{i}.bias"] = normal(channels, **masters)
    for name in case.network.embedding.split():
        trains[name] = normal(n, b.cout, std=0.5)
    if case.network.projects(b):
        trains["skip.weight"] = normal(b.cout, b.cin, 1, 1, std=b.cin**-0.5)
        trains["skip.bias"] = normal(b.cout)
    frozen = {}
    for i, channels in enumerate((b.cin, b.cout)):
        frozen[f"conv{i}.weight"] = normal(b.cout, channels, 3, 3, std=(9 * channels) ** -0.5)
        frozen[f"conv{i}.bias"] = normal(b.cout)
    if b.resample:
        frozen["taps"] = plain.taps(case.network.filter, b.cin, trains["x"])
    return {name: value.requires_grad_() for name, value in trains.items()} | frozen


def _gain(case: Case) -> float:
    return 1.0 if case.network.adm else 0.5**0.5


def eager(case: Case, t: Inputs) -> Tensor:
    return plain.block(t, _block(case).resample, _gain(case))


def _by_kernels(function: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    norms = [Norm(t[f"norm{i}.weight"], t[f"norm{i}.bias"], 32, 1e-5) for i in (0, 1)]
    convs = [Conv(t[f"conv{i}.weight"], t[f"conv{i}.bias"]) for i in (0, 1)]
    return function(
        *(t["x"], norms[0], convs[0], norms[1], convs[1]),
        **{name: t[name] for name in case.network.embedding.split()},
        skip=Conv(t["skip.weight"], t["skip.bias"]) if "skip.weight" in t else None,
        resample=_block(case).resample,
        filter=case.network.filter,
        gain=_gain(case),
    )


def ours(case: Case, t: Inputs) -> Tensor:
    return _by_kernels(frozen_unet_block, case, t)


def exact(case: Case, t: Inputs) -> Tensor:
    return _by_kernels(frozen_unet_block_ref, case, t)


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """Our kernels in their order: norms, resampling and sums by bytes, convolutions by FLOP."""
    b, n = _block(case), case.batch
    before, after = n * b.size**2, n * b.out_size**2
    x, small_or_large, y = before * b.cin, after * b.cin, after * b.cout
    conv = [(0, 18 * after * channels * b.cout) for channels in (b.cin, b.cout)]
    resampling = [_moved(x + small_or_large)] if b.resample else []
    skip, along = _skip(case, min(before, after))
    if direction == "forward":
        # The end reads branch and skip, where it enlarges the small skip.
        end = _moved(2 * y + along)
        return [_moved(2 * x), *resampling, conv[0], _moved(2 * y), conv[1], *skip, end]
    # dnorm0 adds the gradient along the skip, which the resampling's adjoint brought to x's size.
    back = [conv[1], _moved(3 * y), conv[0], *resampling, _moved(4 * x)]
    weight = [*skip, _moved(y)] if skip else []
    return [*back, *skip, *weight, *([_moved(along + x)] if b.resample else [])]


def _skip(case: Case, pixels: int) -> tuple[list[tuple[float, float]], float]:
    """The skip's own kernels (it convolves the smaller side), and the elements of its result."""
    b = _block(case)
    down = [_moved(pixels * 5 * b.cin)] if b.resample == "down" else []
    if not case.network.projects(b):
        side = pixels * b.cin * (4 if b.resample == "down" else 1)
        return [], side
    conv = (DTYPE.itemsize * pixels * (b.cin + b.cout), 2 * pixels * b.cin * b.cout)
    return [*down, conv], pixels * b.cout


def _moved(elements: float) -> tuple[float, float]:
    return DTYPE.itemsize * elements, 0


def _block(case: Case) -> Block:
    assert isinstance(case.shape, Block)
    return case.shape


CANDIDATES = {"eager": eager, "ours": ours}
OP = Op("frozen_unet_block", inputs, CANDIDATES, exact, parts, largest=False)


@pytest.mark.parametrize(("candidate", "direction"), OP.runs)
@pytest.mark.parametrize("case", OP.cases, ids=str)
def test_frozen_unet_block(bench: Callable, case: Case, candidate: str, direction: str) -> None:
    bench(OP, case, candidate, direction)
