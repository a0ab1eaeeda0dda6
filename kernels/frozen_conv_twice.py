"""Convolutions with frozen weights that are differentiated twice without any weight gradient.

    y = conv(x, W) + b,   dx = conv'(dy, W),   and the derivative of conv' is conv again

PyTorch's second derivative of a convolution, which R1 needs, also forms the gradient of its weight,
as a convolution with a filter of the image's size, group by group, and drops it where the weight is
frozen. Here each op is the other's derivative. The arithmetic is the library's own, in eager mode
only: R1 is not compiled.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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


def _setup(ctx, inputs, output):
    x, weight, _, *ctx.rest = inputs
    ctx.save_for_backward(x.detach(), weight)


def _backward(ctx, dy):
    return (_input_grad(dy, *ctx.saved_tensors, *ctx.rest), *[None] * 8)


def _input_grad_setup(ctx, inputs, output):
    _, _, weight, *ctx.rest = inputs
    ctx.save_for_backward(weight)


def _input_grad_backward(ctx, ddx):
    (weight,) = ctx.saved_tensors
    return (_conv(ddx, weight, None, *ctx.rest), *[None] * 8)


_conv.register_autograd(_backward, setup_context=_setup)
_input_grad.register_autograd(_input_grad_backward, setup_context=_input_grad_setup)


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
