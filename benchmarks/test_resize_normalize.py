"""resize_normalize to 224 pixels: writing y, or reading dy, bounds it (bfloat16: 2 bytes each)."""

from collections.abc import Callable, Sequence

import torch
from fastgan_kernels import resize_normalize
from fastgan_kernels.resize_normalize import resize_normalize_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from benchmarks.measure import DTYPE, ON_GPU

SIZE = 224 if ON_GPU else 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    """The generator's images are float32."""
    size = case.shape.size
    return {"x": normal(case.batch, 3, size, size, std=0.5, dtype=torch.float32).requires_grad_()}


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    exact = t["x"].dtype == torch.float64
    return op(t["x"], MEAN, STD, SIZE, dtype=None if exact else DTYPE)


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """The small image in float32 and the large one, whichever way."""
    return [(case.batch * 3 * (4 * case.pixels + DTYPE.itemsize * SIZE**2), 0)]


OP = Op("resize_normalize", inputs, call, resize_normalize, resize_normalize_ref, parts)


def test_resize_normalize(bench: Callable[[], None]) -> None:
    bench()
