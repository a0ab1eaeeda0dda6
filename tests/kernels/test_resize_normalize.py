"""resize_normalize and its adjoint against the float64 definition."""

from collections.abc import Callable
from importlib import import_module
from math import nan

import pytest
import torch
from fastgan_kernels.resize_normalize import resize_normalize, resize_normalize_ref
from oracle import DEVICE, DTYPES, check, results
from torch import Tensor
from torch.nn import functional as F

NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# N, channels, H, W, size: the published ratios 224 / 32 and 224 / 64, then the nasty ones.
SHAPES = {
    "32 to 224": (2, 3, 2, 2, 14),
    "64 to 224": (1, 3, 4, 4, 14),
    "grey, 32 to 224": (2, 1, 2, 2, 14),
    "more than one block": (1, 3, 3, 10, 90),
    "odd ratio, not square": (2, 3, 5, 7, 12),
    "grey, odd ratio": (1, 1, 7, 5, 11),
    "nearly the same": (1, 3, 7, 6, 8),
    "same": (2, 3, 4, 4, 4),
    "smaller": (1, 3, 8, 6, 5),
    "pixels that nothing reads": (1, 1, 21, 19, 4),
    "taller and narrower": (1, 3, 3, 20, 9),
    "one pixel": (3, 3, 1, 1, 5),
    "to one pixel": (2, 3, 5, 4, 1),
    "one row": (2, 1, 1, 8, 20),
}


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(shape[:4], generator=generator) * 2 - 1).to(DEVICE, dtype)


def compare(x: Tensor, size: int) -> None:
    check(resize_normalize, resize_normalize_ref, {"x": x}, size=size, **NORMAL)


@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(name: str, poisoned: None) -> None:
    shape = SHAPES[name]
    compare(make(shape), shape[-1])


@pytest.mark.parametrize("of_x", DTYPES)
@pytest.mark.parametrize("of_y", DTYPES)
def test_another_dtype_of_the_result(of_x: torch.dtype, of_y: torch.dtype, poisoned: None) -> None:
    def to_dtype(x: Tensor, **options: object) -> Tensor:
        return resize_normalize(x, dtype=None if x.dtype == of_y else of_y, **options)  # type: ignore[arg-type]

    x = make((2, 3, 4, 5), of_x)
    found = check(to_dtype, resize_normalize_ref, {"x": x}, size=9, **NORMAL)
    assert found["y"].dtype == of_y and found["grad x"].dtype == of_x


@pytest.mark.parametrize("size", [1, 4, 7, 9])
def test_every_ratio(size: int, poisoned: None) -> None:
    """The adjoint's windows are exact at every border: columns of any ratio, rows of two others."""
    for width in range(1, 12):
        compare(make((1, 3, 1 + width % 3, width)), size)


def test_the_definition_normalises_then_interpolates() -> None:
    """As one writes it down, and by hand: halfway between -1 and 1 lies mid-grey."""
    x = make((2, 1, 4, 4)).double()
    mean, std = (torch.tensor(v, device=DEVICE).double().view(3, 1, 1) for v in NORMAL.values())
    normal = ((x.expand(-1, 3, -1, -1) + 1) / 2 - mean) / std
    expected = F.interpolate(normal, (7, 7), mode="bilinear", align_corners=False)
    found = resize_normalize_ref(x, size=7, **NORMAL)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-6)
    step = torch.tensor([-1.0, 1.0], device=DEVICE).expand(1, 3, 2, 2)
    for function in (resize_normalize_ref, resize_normalize):
        y = function(step, (0.5, 0.5, 0.25), (0.5, 0.25, 0.25), 4)
        assert y[0, 0, 1].tolist() == [-1.0, -0.5, 0.5, 1.0]
        assert y[0, 1, 2].tolist() == [-2.0, -1.0, 1.0, 2.0]
        assert y[0, 2, 3].tolist() == [-1.0, 0.0, 2.0, 3.0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda x: x[:, 1:4, 1:4, 1::2],
    "surrounded by NaN": lambda x: F.pad(x[:, :3], (1, 1, 1, 1), value=nan)[:, :, 1:-1, 1:-1],
    "transposed": lambda x: x[:, 1:4].transpose(2, 3),
    "batch innermost": lambda x: x[:, :3].permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "grey, expanded": lambda x: x[:, 2:3].expand(-1, 3, -1, -1),
    "grey, sliced": lambda x: x[:, 2:3, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_read_in_place(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = LAYOUTS[layout](make((2, 5, 4, 6)).to(memory_format=torch.channels_last))
    dense = x.clone(memory_format=torch.contiguous_format)
    expected = results(resize_normalize, {"x": dense}, size=5, **NORMAL)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "contiguous", None)
        y = resize_normalize(x, size=5, **NORMAL)
    assert torch.equal(y, expected["y"])
    found = results(resize_normalize, {"x": x}, size=5, **NORMAL)
    assert torch.equal(found["grad x"], expected["grad x"])


@pytest.mark.parametrize("size", [3, 13])
def test_an_overflown_gradient_stays_where_it_is(size: int) -> None:
    """Padding and neighbours beyond the window are not multiplied by zero, but left out."""
    x = make((1, 3, 6, 6)).requires_grad_()
    dy = torch.zeros(1, 3, size, size, device=DEVICE)
    dy[0, 1, size - 1, size // 2] = torch.inf
    (found,) = torch.autograd.grad(resize_normalize(x, size=size, **NORMAL), x, dy)
    y = resize_normalize_ref(x, size=size, **NORMAL)
    (touched,) = torch.autograd.grad(y, x, dy.isinf().float())
    assert torch.equal(found.isinf(), touched != 0) and not found.isnan().any()


def test_large_images_go_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("fastgan_kernels.resize_normalize")
    monkeypatch.setattr(module, "LARGEST", 8)
    monkeypatch.setattr(module, "_op", None)
    compare(make((1, 3, 9, 4)), 5)
