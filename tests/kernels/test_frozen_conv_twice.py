"""Frozen convolutions differentiated twice: PyTorch's values, and none of its weight gradients."""

import pytest
import torch
from fastgan_kernels.frozen_conv import FrozenConvolutions
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

CASES = {
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


def r1(layers: nn.Sequential, x: torch.Tensor, mode: bool) -> list[torch.Tensor]:
    """Output, penalty, its gradients for the trained last layer and for the image."""
    x = x.clone().requires_grad_()
    if mode:
        with FrozenConvolutions():
            y = layers(x)
    else:
        y = layers(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    penalty = slope.square().sum()
    return [y, penalty, *torch.autograd.grad(penalty, [x, *layers[-1].parameters()])]


class WeightGradients(TorchDispatchMode):
    """Counts convolutions whose filter is an image: the second derivative's weight gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.number += args[1].shape[-1] > 3
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_twice_as_pytorch_does(case: str) -> None:
    layers = network(*CASES[case])
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    for ours, theirs in zip(r1(layers, x, True), r1(layers, x, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_derivatives_are_those_of_numbers() -> None:
    layers = network(*CASES["stride"])

    def slope(x: torch.Tensor) -> torch.Tensor:
        with FrozenConvolutions():
            y = layers(x)
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]

    x = torch.randn(1, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(slope, x)


def test_no_weight_gradient_of_what_is_frozen() -> None:
    layers, x = network(*CASES["depthwise"]), torch.randn(2, 6, 9, 8, dtype=torch.float64)
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
        expected = layers(x)
        with FrozenConvolutions():
            found = layers(x)
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
    assert trained.grad is not None and bias.grad is not None
    assert bias.grad.tolist() == [36.0] * 4
