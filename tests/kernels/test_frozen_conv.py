"""Frozen convolutions are PyTorch's, minus what a frozen weight does not need, also twice."""

import pytest
import torch
from fastgan_kernels.frozen_conv import (
    FrozenConvolutions,
    flip_weight,
    frozen_conv2d,
    frozen_conv2d_ref,
)
from oracle import DEVICE, check, results
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    tensors, options = make(name, dtype)
    found = check(frozen_conv2d, frozen_conv2d_ref, tensors, ["x"], **options)
    assert found["grad x"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["3x3", "1x1", "fused downsampling's padding"])
def test_flipped_weight_gives_the_same_gradient(name: str) -> None:
    tensors, options = make(name)
    expected = results(frozen_conv2d_ref, tensors, ["x"], **options)
    flipped = flip_weight(tensors["weight"])
    found = results(frozen_conv2d, tensors, ["x"], flipped=flipped, **options)
    assert torch.allclose(found["grad x"], expected["grad x"], atol=1e-5)
    assert torch.equal(found["y"], expected["y"])


MODULES = {
    "plain": (nn.Conv2d, {"padding": 1}),
    "stride": (nn.Conv2d, {"stride": 2, "padding": 1, "bias": False}),
    "depthwise": (nn.Conv2d, {"stride": (2, 1), "padding": (0, 1), "groups": 6}),
    "groups, dilated": (nn.Conv2d, {"padding": 2, "dilation": 2, "groups": 2}),
    "transposed": (nn.ConvTranspose2d, {"stride": 2, "padding": 1, "output_padding": 1}),
    "transposed groups": (nn.ConvTranspose2d, {"stride": 2, "groups": 3}),
}


def network(kind: type, arguments: dict) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(kind(6, 12, 3, **arguments), nn.SiLU()).double().requires_grad_(False)
    return layers.append(nn.Conv2d(12, 2, 1).double())


def inside(layers: nn.Module, x: Tensor) -> Tensor:
    with FrozenConvolutions():
        return layers(x)


def r1(layers: nn.Sequential, x: Tensor, mode: bool) -> list[Tensor]:
    """Output, penalty, its gradients for the trained last layer and for the image."""
    x = x.clone().requires_grad_()
    y = inside(layers, x) if mode else layers(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    penalty = slope.square().sum()
    return [y, penalty, *torch.autograd.grad(penalty, [x, *layers[-1].parameters()])]


class WeightGradients(TorchDispatchMode):
    """Counts convolutions whose filter is an image: the second derivative's weight gradients."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.number += args[1].shape[-1] > 3
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", MODULES)
def test_modules_twice_as_pytorch_does(case: str) -> None:
    layers = network(*MODULES[case])
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    for ours, theirs in zip(r1(layers, x, True), r1(layers, x, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_weight_gradient_of_what_is_frozen() -> None:
    layers, x = network(*MODULES["depthwise"]), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    counted = []
    for mode in (True, False):
        with WeightGradients() as counter:
            r1(layers, x, mode)
        counted.append(counter.number)
    # The trained layer's, and PyTorch's one for each group of the frozen one.
    assert counted == [1, 1 + 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_as_a_convolution(dtype: torch.dtype) -> None:
    layers = nn.Conv2d(6, 12, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        expected, found = layers(x), inside(layers, x)
    assert found.dtype == dtype and torch.equal(found, expected)
    slopes = [torch.autograd.grad(y.float().sum(), x)[0] for y in (found, expected)]
    assert slopes[0].dtype == torch.float32
    torch.testing.assert_close(*slopes, rtol=0, atol=0)


def test_what_trains_keeps_its_gradient() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    trained = weight.clone().requires_grad_()
    with FrozenConvolutions():
        F.conv2d(x, trained).sum().backward()
        F.conv2d(x, weight, bias, padding="same").sum().backward()
        F.conv_transpose2d(x, trained.transpose(0, 1)).sum().backward()
    assert trained.grad is not None and bias.grad is not None
    assert bias.grad.tolist() == [36.0] * 4
