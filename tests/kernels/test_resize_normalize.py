"""resize_normalize against its float64 definition, with its adjoint and second derivative."""

from collections.abc import Callable
from importlib import import_module
from math import nan

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.resize_normalize import resize_normalize, resize_normalize_ref
from oracle import DEVICE, DTYPES, assert_as_accurate, gradients
from torch import Tensor
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE = [0.5 / s for s in STD]
# N, channels, H, W, size: the published ratios 224 / 32 and 224 / 64, then the nasty ones.
SHAPES = {
    "32 to 224": (2, 3, 4, 4, 28),
    "64 to 224": (1, 3, 8, 8, 28),
    "grey, 32 to 224": (2, 1, 4, 4, 28),
    "more than one block": (1, 3, 10, 10, 90),
    "odd ratio, not square": (2, 3, 5, 7, 12),
    "grey, odd ratio": (1, 1, 7, 5, 11),
    "nearly the same": (1, 3, 13, 12, 14),
    "same": (2, 3, 6, 6, 6),
    "smaller": (2, 3, 16, 12, 7),
    "pixels that nothing reads": (2, 1, 21, 19, 4),
    "taller and narrower": (1, 3, 3, 20, 9),
    "one pixel": (3, 3, 1, 1, 5),
    "to one pixel": (2, 3, 5, 4, 1),
    "one row": (2, 1, 1, 8, 20),
}


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(shape[:4], generator=generator) * 2 - 1).to(DEVICE, dtype)


def results(function: Callable[..., Tensor], x: Tensor, size: int, **options: object) -> dict:
    """The output and the gradient of x; the leaf is strided as x is."""
    x = x.detach().requires_grad_()
    y = function(x, MEAN, STD, size, **options)
    return {"y": y, **gradients([y], {"x": x})}


def check(x: Tensor, size: int, dtype: torch.dtype | None = None) -> None:
    exact = results(resize_normalize_ref, x.double(), size)
    dispatch.use("library")
    plain = results(resize_normalize, x, size, dtype=dtype)
    dispatch.use("triton")
    ours = results(resize_normalize, x, size, dtype=dtype)
    assert_as_accurate(ours, plain, exact)
    assert ours["y"].dtype == (dtype or x.dtype) and ours["grad x"].dtype == x.dtype
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype, poisoned: None) -> None:
    shape = SHAPES[name]
    check(make(shape, dtype), shape[-1])


@pytest.mark.parametrize("of_x", DTYPES)
@pytest.mark.parametrize("of_y", DTYPES)
def test_another_dtype_of_the_result(of_x: torch.dtype, of_y: torch.dtype, poisoned: None) -> None:
    check(make((2, 3, 4, 5), of_x), 9, of_y)


@pytest.mark.parametrize("size", range(1, 10))
def test_every_ratio(size: int, poisoned: None) -> None:
    """The adjoint's windows are exact at every border: columns of any ratio, rows of two others."""
    for width in range(1, 12):
        check(make((1, 3, 1 + width % 3, width)), size)


def test_the_definition_normalises_then_interpolates() -> None:
    """As one writes it down, and by hand: halfway between -1 and 1 lies mid-grey."""
    x = make((2, 1, 4, 4)).double()
    mean, std = (torch.tensor(v, device=DEVICE).double().view(1, 3, 1, 1) for v in (MEAN, STD))
    normal = ((x.expand(-1, 3, -1, -1) + 1) / 2 - mean) / std
    expected = F.interpolate(normal, (7, 7), mode="bilinear", align_corners=False)
    assert torch.allclose(resize_normalize_ref(x, MEAN, STD, 7), expected, rtol=1e-12, atol=1e-6)
    step = torch.tensor([-1.0, 1.0], device=DEVICE).expand(1, 3, 2, 2)
    for function in (resize_normalize_ref, resize_normalize):
        y = function(step, (0.5, 0.5, 0.25), (0.5, 0.25, 0.25), 4)
        assert y[0, 0, 1].tolist() == [-1.0, -0.5, 0.5, 1.0]
        assert y[0, 1, 2].tolist() == [-2.0, -1.0, 1.0, 2.0]
        assert y[0, 2, 3].tolist() == [-1.0, 0.0, 2.0, 3.0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "sliced": lambda x: x[:, 1:4, 1:6, 2::2],
    "surrounded by NaN": lambda x: F.pad(x[:, :3], (1, 1, 1, 1), value=nan)[:, :, 1:-1, 1:-1],
    "transposed": lambda x: x[:, 1:4].transpose(2, 3),
    "batch innermost": lambda x: x[:, :3].permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "one sample for all": lambda x: x[:1, :3].expand(3, -1, -1, -1),
    "grey, expanded": lambda x: x[:, 2:3].expand(-1, 3, -1, -1),
    "grey, sliced": lambda x: x[:, 2:3, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_read_in_place(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make((2, 5, 8, 8)).to(memory_format=torch.channels_last)
    x = LAYOUTS[layout](x if layout != "nchw" else x[:, :3])
    dense = results(resize_normalize, x.clone(memory_format=torch.contiguous_format), 11)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "contiguous", None)
        y = resize_normalize(x, MEAN, STD, 11)
    assert torch.equal(y, dense["y"])
    assert torch.equal(results(resize_normalize, x, 11)["grad x"], dense["grad x"])


@pytest.mark.parametrize("gradient", ["expanded", "nchw", "sliced"])
def test_any_layout_of_the_incoming_gradient(gradient: str) -> None:
    x = make((2, 3, 4, 4)).requires_grad_()
    dy = {
        "expanded": torch.ones(1, device=DEVICE).expand(2, 3, 9, 9),
        "nchw": torch.randn(2, 3, 9, 9, device=DEVICE),
        "sliced": torch.randn(2, 3, 19, 9, device=DEVICE)[:, :, 1::2],
    }[gradient]
    (found,) = torch.autograd.grad(resize_normalize(x, MEAN, STD, 9), x, dy)
    double = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(resize_normalize_ref(double, MEAN, STD, 9), double, dy.double())
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [3, 13])
def test_an_overflown_gradient_stays_where_it_is(size: int) -> None:
    """Padding and neighbours beyond the window are not multiplied by zero, but left out."""
    x = make((1, 3, 6, 6)).requires_grad_()
    dy = torch.zeros(1, 3, size, size, device=DEVICE)
    dy[0, 1, size - 1, size // 2] = torch.inf
    (found,) = torch.autograd.grad(resize_normalize(x, MEAN, STD, size), x, dy)
    y = resize_normalize_ref(x, MEAN, STD, size)
    (touched,) = torch.autograd.grad(y, x, dy.isinf().float())
    assert torch.equal(found.isinf(), touched != 0) and not found.isnan().any()


def r1(function: Callable[..., Tensor], x: Tensor, weight: Tensor, size: int) -> dict:
    """R1's gradients for the discriminator's weight and for x, with a layer that is not linear."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = F.conv2d(function(x, MEAN, STD, size), weight, stride=2).tanh()
    (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    penalty = g.square().sum()
    found = torch.autograd.grad(penalty, (x, weight))
    return {"penalty": penalty, "grad x": found[0], "grad weight": found[1]}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 9), (2, 1, 4, 4, 9), (1, 3, 9, 8, 5)])
def test_twice_differentiable(shape: tuple[int, ...], poisoned: None) -> None:
    """R1 through the op itself, not through its definition."""
    x, size = make(shape), shape[-1]
    weight = 0.05 * torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = r1(resize_normalize, x, weight, size)
    exact = r1(resize_normalize_ref, x.double(), weight.double(), size)
    assert_as_accurate(ours, r1(resize_normalize_ref, x, weight, size), exact)


def test_gradcheck_of_the_definition() -> None:
    dispatch.use("auto")
    for shape in ((1, 3, 2, 3), (2, 1, 3, 3)):
        x = make(shape).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: resize_normalize(x, MEAN, STD, 4), x)
        assert torch.autograd.gradgradcheck(lambda x: resize_normalize(x, MEAN, STD, 4), x)


def test_the_same_bits_every_time() -> None:
    x = make((2, 1, 6, 6))
    first, again = (results(resize_normalize, x, 17) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_keeps_nothing_for_backward() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        resize_normalize(make((2, 3, 4, 4)).requires_grad_(), MEAN, STD, 9)
    assert kept == []


def test_large_images_go_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make((1, 3, 9, 4))
    module = import_module("fastgan_kernels.resize_normalize")
    monkeypatch.setattr(module, "LARGEST", 8)
    monkeypatch.setattr(module, "_op", None)
    found = resize_normalize(x, MEAN, STD, 5)
    assert torch.allclose(found, resize_normalize_ref(x, MEAN, STD, 5), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_opcheck(channels: int) -> None:
    x = make((2, channels, 4, 5)).requires_grad_()
    arguments = (x, SCALE, [0.1, 0.2, 0.3], 7, torch.float32)
    torch.library.opcheck(torch.ops.fastgan.resize_normalize, arguments)
    dy = torch.randn(2, 3, 7, 7, device=DEVICE, requires_grad=True)
    arguments = (dy, SCALE, channels, 4, 5, torch.float16)
    torch.library.opcheck(torch.ops.fastgan.resize_normalize_adjoint, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager_in_one_graph(backend: str) -> None:
    x = make((2, 3, 4, 4))
    compiled = torch.compile(resize_normalize, fullgraph=True, backend=backend)
    eager = results(resize_normalize, x, 9, dtype=torch.float16)
    found = results(compiled, x, 9, dtype=torch.float16)
    assert all(torch.equal(eager[name], found[name]) for name in eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x has shape \[3, 4, 4\]"),
        ({"x": torch.zeros(2, 4, 4, 4)}, "x has 4 channels, 1 or 3 would do"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "x is torch.uint8"),
        ({"mean": (0.5,)}, "mean has 1 values, 3 would do"),
        ({"std": (0.5, 0.5)}, "std has 2 values, 3 would do"),
        ({"std": (0.5, 0.0, 0.5)}, r"std is \[0.5, 0.0, 0.5\], positive numbers would do"),
        ({"std": (0.5, nan, 0.5)}, "positive numbers would do"),
        ({"size": 0}, "size is 0, 1 or more would do"),
        ({"dtype": torch.int8}, "dtype is torch.int8, one of bfloat16, float16"),
        ({"dtype": torch.float64}, "no kernel for float64"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 4, 4), "mean": MEAN, "std": STD} | change
    with pytest.raises(ValueError, match=message):
        resize_normalize(**arguments)
