"""A convolution whose weight does not train: nothing saved, backward only to the input.

    y = conv2d(x, W) + b,   dx = conv_transpose2d(dy, W)

x [N, Cin, H, W], weight [Cout, Cin, k, k]. PyTorch's convolution keeps its input whether or not the
weight trains, although only a weight gradient would read it; this one keeps the weight alone.
Bound by arithmetic (2 Cin k^2 FLOP per element of y), so that both directions are the library's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastgan_kernels import dispatch
from fastgan_kernels.runtime import channels_last_like, check_image, check_tensor, to_channels_last

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


_ATEN = torch.ops.aten
_IN = ("input", "weight", "bias", "stride", "padding")
_ARGUMENTS = {
    F.conv2d: (*_IN, "dilation", "groups"),
    F.conv_transpose2d: (*_IN, "output_padding", "groups", "dilation"),
}
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1}
_DEFAULTS |= {"output_padding": 0, "groups": 1}


@torch.library.custom_op("fastgan::frozen_conv", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    rest = (stride, padding, dilation, transposed, output_padding, groups)
    return _ATEN.convolution(x, weight, bias, *rest)


@torch.library.custom_op("fastgan::frozen_conv_input_grad", mutates_args=())
def _input_grad(
    dy: Tensor,
    like: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """`like` is x, of which the library reads shape and layout."""
    rest = (stride, padding, dilation, transposed, output_padding, groups)
    mask = [True, False, False]
    return _ATEN.convolution_backward(dy, like, weight, None, *rest, mask)[0]


def _twice_setup(ctx, inputs, output):
    x, weight, _, *ctx.rest = inputs
    ctx.save_for_backward(x.detach(), weight)


def _twice_backward(ctx, dy):
    return (_input_grad(dy, *ctx.saved_tensors, *ctx.rest), *[None] * 8)


def _twice_input_grad_setup(ctx, inputs, output):
    _, _, weight, *ctx.rest = inputs
    ctx.save_for_backward(weight)


def _twice_input_grad_backward(ctx, ddx):
    (weight,) = ctx.saved_tensors
    return (_conv(ddx, weight, None, *ctx.rest), *[None] * 8)


_conv.register_autograd(_twice_backward, setup_context=_twice_setup)
_input_grad.register_autograd(_twice_input_grad_backward, setup_context=_twice_input_grad_setup)


class FrozenConvolutions(TorchFunctionMode):
    """Inside, F.conv2d and F.conv_transpose2d of [N, C, H, W] with frozen weights are these ops.

    Modules use those functions, so that a network as it is gets them. Second derivatives may be
    taken outside.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ARGUMENTS:
            given = _DEFAULTS | dict(zip(_ARGUMENTS[func], args, strict=False)) | kwargs
            if _fits(given):
                return _frozen(given, transposed=func is F.conv_transpose2d)
        return func(*args, **kwargs)


def _fits(given: dict[str, Any]) -> bool:
    x, trained = given["input"], (given["weight"], given["bias"])
    if any(t is not None and t.requires_grad for t in trained):
        return False
    return x.requires_grad and x.ndim == 4 and not isinstance(given["padding"], str)


def _frozen(given: dict[str, Any], *, transposed: bool) -> Tensor:
    x, weight, bias = (_as_autocast(given[name]) for name in _IN[:3])
    stride, padding, dilation, output_padding = (
        _pair(given[name]) for name in ("stride", "padding", "dilation", "output_padding")
    )
    groups = given["groups"]
    return _conv(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _as_autocast(x: Tensor | None) -> Tensor | None:
    """What autocast makes of a convolution's arguments: it does not know these ops."""
    if x is None or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _pair(value: int | tuple[int, ...] | list[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
