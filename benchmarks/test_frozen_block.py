"""frozen_unet_block without attention, and what each candidate keeps for backward."""

from collections.abc import Callable, Sequence

import pytest
import torch
from fastgan_kernels.aot.shapes import Block
from fastgan_kernels.attention import Conv, Norm
from fastgan_kernels.frozen_block import frozen_unet_block, frozen_unet_block_ref
from torch import Tensor

from benchmarks import plain
from benchmarks.cases import Case
from benchmarks.measure import DTYPE, seconds
from benchmarks.op import Inputs, Op

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
    """Our kernels: norms, resampling and sums by bytes, convolutions of 3 x 3 pixels by FLOP."""
    b = _block(case)
    before, after = case.batch * b.size**2, case.batch * b.out_size**2
    x, y = before * b.cin, after * b.cout
    convs = [(0, 18 * after * channels * b.cout) for channels in (b.cin, b.cout)]
    resampling = [_moved((before + after) * b.cin)] if b.resample else []
    if direction == "backward":
        # norm0's part adds the gradient that arrives along the skip.
        back = [*convs, *resampling, _moved(3 * y), _moved(4 * x)]
        return back + _skip_backward(case, before, after)
    norms_and_sum = [_moved(2 * x), _moved(2 * y), _moved(2 * y + _along(case, before, after))]
    return [*convs, *resampling, *norms_and_sum, *_skip_forward(case, before, after)]


def _along(case: Case, before: int, after: int) -> int:
    """Elements of the skip that the sum reads: it resamples by itself what has not been yet."""
    b = _block(case)
    return min(before, after) * b.cout if case.network.projects(b) else before * b.cin


def _skip_forward(case: Case, before: int, after: int) -> list[tuple[float, float]]:
    """A 1 x 1 convolution on the smaller side, behind the resampling if that is the later one."""
    b = _block(case)
    if not case.network.projects(b):
        return []
    down = [_moved((before + after) * b.cin)] if b.resample == "down" else []
    return [_projection(b, min(before, after)), *down]


def _skip_backward(case: Case, before: int, after: int) -> list[tuple[float, float]]:
    """Of input, weight (which sees the resampled input again) and bias."""
    b = _block(case)
    if not case.network.projects(b):
        return [_moved((before + after) * b.cin)] if b.resample else []
    resampled = {"": 0, "up": b.cout, "down": 2 * b.cin}[b.resample]
    projections = 2 * [_projection(b, min(before, after))]
    return [*projections, _moved(after * b.cout), _moved((before + after) * resampled)]


def _projection(b: Block, pixels: int) -> tuple[float, float]:
    return DTYPE.itemsize * pixels * (b.cin + b.cout), 2 * pixels * b.cin * b.cout


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
