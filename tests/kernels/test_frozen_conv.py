"""frozen_conv2d is PyTorch's convolution, minus what a frozen weight does not need."""

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.frozen_conv import flip_weight, frozen_conv2d
from oracle import DEVICE, assert_as_accurate, gradients
from torch import Tensor
from torch.nn import functional as F

# N, Cin, Cout, H, W, k, stride, padding
SHAPES = {
    "3x3": (2, 8, 16, 6, 6, 3, 1, 1),
    "1x1": (2, 16, 8, 5, 5, 1, 1, 0),
    "fused downsampling's padding": (1, 3, 8, 8, 8, 3, 1, 2),
    "stride 2, even": (2, 4, 6, 8, 8, 3, 2, 1),
    "stride 2, odd": (1, 5, 3, 7, 9, 3, 2, 1),
    "one pixel": (3, 8, 8, 1, 1, 3, 1, 1),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict]:
    n, cin, cout, h, w, k, stride, padding = SHAPES[name]
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        x = torch.randn(size, generator=generator).to(DEVICE, dtype)
        return x.to(memory_format=torch.channels_last) if len(size) == 4 else x

    tensors = {"x": normal(n, cin, h, w), "weight": normal(cout, cin, k, k), "bias": normal(cout)}
    return tensors, {"stride": stride, "padding": padding}


def results(function, tensors: dict[str, Tensor], options: dict) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    x = tensors["x"].clone().requires_grad_()
    y = function(x, tensors["weight"], tensors["bias"], **options)
    return {"y": y, **gradients([y], {"x": x})}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    tensors, options = make(name, dtype)
    exact = results(F.conv2d, {k: v.double() for k, v in tensors.items()}, options)
    ours = results(frozen_conv2d, tensors, options)
    assert_as_accurate(ours, results(F.conv2d, tensors, options), exact)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    assert ours["grad x"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["3x3", "1x1", "fused downsampling's padding"])
def test_flipped_weight_gives_the_same_gradient(name: str) -> None:
    tensors, options = make(name)
    flipped = {"flipped": flip_weight(tensors["weight"])}
    expected = results(F.conv2d, tensors, options)
    found = results(frozen_conv2d, tensors, options | flipped)
    assert torch.allclose(found["grad x"], expected["grad x"], atol=1e-5)
    assert torch.equal(found["y"], expected["y"])


def test_keeps_nothing_but_the_weight() -> None:
    tensors, options = make("3x3")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_conv2d(tensors["x"].requires_grad_(), tensors["weight"], **options)
    assert [t.data_ptr() for t in kept] == [tensors["weight"].data_ptr()]


def test_twice_differentiable() -> None:
    """R1 through the op itself equals R1 through PyTorch's convolution."""
    tensors, options = make("stride 2, odd")

    def penalty(function) -> Tensor:  # type: ignore[no-untyped-def]
        x = tensors["x"].clone().requires_grad_()
        y = function(x, tensors["weight"], tensors["bias"], **options).tanh().sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (found,) = torch.autograd.grad(g.square().sum(), x)
        return found

    assert torch.allclose(penalty(frozen_conv2d), penalty(F.conv2d), atol=1e-5)


def test_opcheck() -> None:
    tensors, _ = make("stride 2, odd")
    x, w, b = tensors["x"].requires_grad_(), tensors["weight"], tensors["bias"]
    torch.library.opcheck(torch.ops.fastgan.frozen_conv2d, (x, w, b, None, 2, 1))
    dy = torch.randn(1, 3, 4, 5, device=DEVICE, requires_grad=True)
    arguments = (dy, w, None, [7, 9], 2, 1)
    torch.library.opcheck(torch.ops.fastgan.frozen_conv2d_input_grad, arguments)


def test_compiled_equals_eager_in_one_graph() -> None:
    tensors, options = make("3x3")
    compiled = torch.compile(frozen_conv2d, fullgraph=True, backend="aot_eager")
    eager, found = results(frozen_conv2d, tensors, options), results(compiled, tensors, options)
    assert all(torch.equal(eager[name], found[name]) for name in eager)


def test_gradcheck_of_the_definition() -> None:
    dispatch.use("auto")
    tensors, options = make("3x3")
    x, w = tensors["x"][:1, :, :3, :3].double().requires_grad_(), tensors["weight"].double()
    assert torch.autograd.gradcheck(lambda x: frozen_conv2d(x, w, **options), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(16, 8, 3, 3, requires_grad=True)}, "weight requires a gradient"),
        ({"weight": torch.zeros(16, 8, 3, 3).half()}, "weight is torch.float16, x torch.float32"),
        ({"weight": torch.zeros(16, 9, 3, 3)}, r"weight has shape \[16, 9, 3, 3\]"),
        ({"bias": torch.zeros(8)}, r"bias has shape \[8\], \[16\] would fit x"),
        ({"flipped": torch.zeros(16, 8, 3, 3)}, r"flipped has shape \[16, 8, 3, 3\]"),
        ({"x": torch.zeros(8, 6, 6)}, r"x has shape \[8, 6, 6\]"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 8, 6, 6), "weight": torch.zeros(16, 8, 3, 3)} | change
    with pytest.raises(ValueError, match=message):
        frozen_conv2d(**arguments)
