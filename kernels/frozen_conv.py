"""A convolution whose weight does not train: nothing saved, backward only to the input.

    y = conv2d(x, W) + b,   dx = conv_transpose2d(dy, W)

x [N, Cin, H, W], weight [Cout, Cin, k, k]. PyTorch's convolution keeps its input whether or not the
weight trains, although only a weight gradient would read it; this one keeps the weight alone.
Bound by arithmetic (2 Cin k^2 FLOP per element of y), so that both directions are the library's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch
from kernels.checks import check_image, check_tensor
from kernels.layout import channels_last_like, to_channels_last

OP = "frozen_conv2d"


def frozen_conv2d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """The definition: PyTorch's convolution."""
    return F.conv2d(x, weight, bias, stride, padding)


def flip_weight(weight: Tensor) -> Tensor:
    """[Cin, Cout, k, k]: a forward convolution of dy with it is the input gradient (stride 1)."""
    return to_channels_last(weight.flip(2, 3).transpose(0, 1))


def frozen_conv2d_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> Tensor:
    """The library's convolution, channels_last whatever the library returned."""
    return to_channels_last(F.conv2d(x, weight, bias, stride, padding))


def frozen_conv2d_input_grad(
    dy: Tensor,
    weight: Tensor,
    flipped: Tensor | None,
    size: list[int],
    stride: int,
    padding: int,
) -> Tensor:
    """dx of height and width `size`; as a forward convolution where a flipped weight is given."""
    k = weight.shape[-1]
    if flipped is not None:
        return frozen_conv2d_forward(dy, flipped, None, 1, k - 1 - padding)
    # Several heights share one output height when the stride is 2: the rest of the division.
    rest = [
        n - ((m - 1) * stride - 2 * padding + k) for n, m in zip(size, dy.shape[2:], strict=True)
    ]
    return to_channels_last(F.conv_transpose2d(dy, weight, None, stride, padding, rest))


@torch.library.custom_op("fastgan::frozen_conv2d", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    flipped: Tensor | None,
    stride: int,
    padding: int,
) -> Tensor:
    return frozen_conv2d_forward(x, weight, bias, stride, padding)


@torch.library.custom_op("fastgan::frozen_conv2d_input_grad", mutates_args=())
def _input_grad_op(
    dy: Tensor,
    weight: Tensor,
    flipped: Tensor | None,
    size: list[int],
    stride: int,
    padding: int,
) -> Tensor:
    dy = channels_last_like(dy, weight)
    return frozen_conv2d_input_grad(dy, weight, flipped, size, stride, padding)


@_op.register_fake
def _(x, weight, bias, flipped, stride, padding):
    n, _, *size = x.shape
    k = weight.shape[-1]
    size = [(length + 2 * padding - k) // stride + 1 for length in size]
    return _fake(x, (n, weight.shape[0], *size))


@_input_grad_op.register_fake
def _(dy, weight, flipped, size, stride, padding):
    return _fake(dy, (dy.shape[0], weight.shape[1], *size))


def _fake(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _setup(ctx, inputs, output):
    x, weight, _, flipped, ctx.stride, ctx.padding = inputs
    ctx.size = list(x.shape[2:])
    ctx.save_for_backward(weight, flipped)


def _backward(ctx, dy):
    weight, flipped = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        dx = _input_grad_op(dy, weight, flipped, ctx.size, ctx.stride, ctx.padding)
    return dx, None, None, None, None, None


def _input_grad_setup(ctx, inputs, output):
    _, weight, flipped, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(weight, flipped)


def _input_grad_backward(ctx, ddx):
    """The adjoint's adjoint: the convolution again."""
    weight, flipped = ctx.saved_tensors
    ddy = _op(channels_last_like(ddx, weight), weight, None, flipped, ctx.stride, ctx.padding)
    return ddy, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)
_input_grad_op.register_autograd(_input_grad_backward, setup_context=_input_grad_setup)


def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    flipped: Tensor | None = None,
) -> Tensor:
    """conv2d(x, weight) + bias without a weight gradient and without keeping x.

    x [N, Cin, H, W], weight [Cout, Cin, k, k] and bias [Cout] in one dtype: keep a cast and
    channels_last weight, a cast at every call costs more than it saves. `flipped`: `flip_weight` of
    it, for an input gradient by forward convolution; stride 1 only. ValueError where a parameter
    asks for a gradient, which it would not get.
    """
    check_image("x", x)
    if weight.ndim != 4 or weight.shape[1] != x.shape[1] or weight.shape[2] != weight.shape[3]:
        wanted = ["Cout", x.shape[1], "k", "k"]
        raise ValueError(f"weight has shape {list(weight.shape)}, {wanted} would fit x")
    check_tensor("bias", bias, weight.shape[:1], x)
    for name, value in (("weight", weight), ("bias", bias)):
        check_frozen(name, value, x)
    if flipped is not None and (stride != 1 or flipped.shape != weight.transpose(0, 1).shape):
        raise ValueError(
            f"flipped has shape {list(flipped.shape)} at stride {stride}, flip_weight "
            "of the weight at stride 1 would do"
        )
    if dispatch.implementation(OP, x.device.type, x.dtype) == "reference":
        return frozen_conv2d_ref(x, weight, bias, stride=stride, padding=padding)
    return _op(to_channels_last(x), weight, bias, flipped, stride, padding)


def check_frozen(name: str, value: Tensor | None, x: Tensor) -> None:
    """ValueError unless `value` is None, or has x's dtype and wants no gradient."""
    if value is None:
        return
    if value.dtype != x.dtype:
        raise ValueError(f"{name} is {value.dtype}, x {x.dtype}, a copy kept in x's dtype would do")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, a frozen convolution computes none: "
            f"{name}.requires_grad_(False) or conv2d would do"
        )
