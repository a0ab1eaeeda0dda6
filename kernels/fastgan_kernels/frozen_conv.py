"""A convolution whose weight does not train: nothing saved, backward only to the input.

    y = conv2d(x, W) + b,   dx = conv_transpose2d(dy, W)

x [N, Cin, H, W], weight [Cout, Cin, k, k]. PyTorch's convolution keeps its input whether or not the
weight trains, although only a weight gradient would read it; this one keeps the weight alone.
Bound by arithmetic (2 Cin k^2 FLOP per element of y), so that both directions are the library's.

`frozen_conv2d` is for networks that call it; `FrozenConvolutions` makes networks of PyTorch's own
modules do without the weight gradients that its second derivative forms and drops.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastgan_kernels import dispatch
from fastgan_kernels.runtime import (
    channels_last_like,
    check_image,
    check_tensor,
    empty_image,
    to_channels_last,
)

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
    dy = channels_last_like(dy, weight)
    k = weight.shape[-1]
    if flipped is not None:
        return frozen_conv2d_forward(dy, flipped, None, 1, k - 1 - padding)
    # Several heights share one output height when the stride is 2: the rest of the division.
    rest = [
        n - ((m - 1) * stride - 2 * padding + k) for n, m in zip(size, dy.shape[2:], strict=True)
    ]
    return to_channels_last(F.conv_transpose2d(dy, weight, None, stride, padding, rest))


_op = torch.library.custom_op(
    "fastgan::frozen_conv2d",
    lambda x, weight, bias, flipped, *rest: frozen_conv2d_forward(x, weight, bias, *rest),
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? flipped, int stride, int padding)"
    " -> Tensor",
)
_input_grad_op = torch.library.custom_op(
    "fastgan::frozen_conv2d_input_grad", frozen_conv2d_input_grad, mutates_args=()
)


@_op.register_fake
def _(x, weight, bias, flipped, stride, padding):
    n, _, *size = x.shape
    k = weight.shape[-1]
    size = [(length + 2 * padding - k) // stride + 1 for length in size]
    return empty_image(x, (n, weight.shape[0], *size))


@_input_grad_op.register_fake
def _(dy, weight, flipped, size, stride, padding):
    return empty_image(dy, (dy.shape[0], weight.shape[1], *size))


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


# Any convolution or its transpose, as PyTorch's own modules ask for them; `like` is x, of which the
# library reads shape and layout. Each of these two ops is the other's derivative.
_REST = "int[2] stride, int[2] padding, int[2] dilation, bool transposed, int[2] output_padding"
_any_conv = torch.library.custom_op(
    "fastgan::frozen_conv",
    lambda x, weight, bias, *rest: torch.ops.aten.convolution(x, weight, bias, *rest),
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_REST}, int groups) -> Tensor",
)
_any_input_grad = torch.library.custom_op(
    "fastgan::frozen_conv_input_grad",
    lambda dy, like, weight, *rest: torch.ops.aten.convolution_backward(
        dy, like, weight, None, *rest, [True, False, False]
    )[0],
    mutates_args=(),
    schema=f"(Tensor dy, Tensor like, Tensor weight, {_REST}, int groups) -> Tensor",
)


def _any_setup(ctx, inputs, output):
    x, weight, _, *ctx.rest = inputs
    ctx.save_for_backward(x.detach(), weight)


def _any_backward(ctx, dy):
    return (_any_input_grad(dy, *ctx.saved_tensors, *ctx.rest), *[None] * 8)


def _any_input_grad_setup(ctx, inputs, output):
    _, _, weight, *ctx.rest = inputs
    ctx.save_for_backward(weight)


def _any_input_grad_backward(ctx, ddx):
    (weight,) = ctx.saved_tensors
    return (_any_conv(ddx, weight, None, *ctx.rest), *[None] * 8)


_any_conv.register_autograd(_any_backward, setup_context=_any_setup)
_any_input_grad.register_autograd(_any_input_grad_backward, setup_context=_any_input_grad_setup)


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
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if not _applies(input, weight, bias, padding):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    tensors = map(_as_autocast, (input, weight, bias))
    return _any_conv(*tensors, stride, padding, dilation, False, 0, groups)


def _conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    if not _applies(input, weight, bias, padding):
        rest = (stride, padding, output_padding, groups, dilation)
        return F.conv_transpose2d(input, weight, bias, *rest)
    tensors = map(_as_autocast, (input, weight, bias))
    return _any_conv(*tensors, stride, padding, dilation, True, output_padding, groups)


_REPLACED: dict[Any, Any] = {F.conv2d: _conv2d, F.conv_transpose2d: _conv_transpose2d}


def _applies(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> bool:
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    return x.requires_grad and x.ndim == 4 and not isinstance(padding, str)


def _as_autocast(x: Tensor | None) -> Tensor | None:
    """What autocast makes of a convolution's arguments: it does not know these ops."""
    if x is None or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
