"""resize_normalize to 224 pixels: writing y, or reading dy, bounds it (bfloat16: 2 bytes each).

`published` normalises and enlarges in float32, as the authors' code does; `eager` enlarges in the
dtype of the result.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from fastgan_kernels import resize_normalize
from fastgan_kernels.resize_normalize import resize_normalize_ref
from torch import Tensor

from benchmarks import plain
from benchmarks.cases import Case
from benchmarks.measure import DEVICE, DTYPE, ON_GPU, seconds
from benchmarks.op import Inputs, Op

pytestmark = pytest.mark.benchmark(timer=seconds, disable_gc=True)
SIZE = 224 if ON_GPU else 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    """The generator's images are float32."""
    size = case.shape.size
    x = normal(case.batch, 3, size, size, std=0.5, dtype=torch.float32).requires_grad_()
    constants = {
        name: torch.tensor(values, device=DEVICE)[:, None, None]
        for name, values in (("mean", MEAN), ("std", STD))
    }
    return {"x": x, **constants}


def eager(case: Case, t: Inputs) -> Tensor:
    return plain.normalised(t["x"], t["mean"], t["std"], SIZE, DTYPE)


def published(case: Case, t: Inputs) -> Tensor:
    return plain.normalised(t["x"], t["mean"], t["std"], SIZE, torch.float32).to(DTYPE)


def ours(case: Case, t: Inputs) -> Tensor:
    return resize_normalize(t["x"], MEAN, STD, SIZE, dtype=DTYPE)


def exact(case: Case, t: Inputs) -> Tensor:
    return resize_normalize_ref(t["x"], MEAN, STD, SIZE)


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """The small image in float32 and the large one, whichever way."""
    images = case.batch * 3
    return [(images * (4 * case.pixels + DTYPE.itemsize * SIZE**2), 0)]


CANDIDATES = {"eager": eager, "published": published, "ours": ours}
OP = Op("resize_normalize", inputs, CANDIDATES, exact, parts)


@pytest.mark.parametrize(("candidate", "direction"), OP.runs)
@pytest.mark.parametrize("case", OP.cases, ids=str)
def test_resize_normalize(bench: Callable, case: Case, candidate: str, direction: str) -> None:
    bench(OP, case, candidate, direction)
