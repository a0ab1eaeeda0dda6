"""resize_normalize: images to a backbone's 224 pixels, mean and deviation."""

from collections.abc import Callable

import torch
from fastgan_kernels import resize_normalize
from fastgan_kernels.resize_normalize import resize_normalize_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Normal, Op, training
from benchmarks.measure import DTYPE, ON_GPU

SIZE = 224 if ON_GPU else 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inputs(case: Case, normal: Normal) -> Inputs:
    """The generator's images are float32."""
    size = case.shape.size
    return training({"x": normal(case.batch, 3, size, size, std=0.5, dtype=torch.float32)})


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    exact = t["x"].dtype == torch.float64
    return op(t["x"], MEAN, STD, SIZE, dtype=None if exact else DTYPE)


def floor(case: Case, direction: str) -> tuple[float, float]:
    """The small image in float32 and the large one, whichever way."""
    return case.batch * 3 * (4 * case.pixels + DTYPE.itemsize * SIZE**2), 0


OP = Op("resize_normalize", inputs, call, resize_normalize, resize_normalize_ref, floor)


def test_resize_normalize(bench: Callable[[], None]) -> None:
    bench()
