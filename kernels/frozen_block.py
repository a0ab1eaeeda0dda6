"""A residual UNet block whose convolutions are frozen, as one node of the autograd graph.

    h = conv0(resample(silu(norm0(x))))
    y = gain (conv1(silu(shift + norm1(h + pre_shift) (1 + scale))) + skip(resample(x)))

x [N, Cin, H, W] -> y [N, Cout, H', W']. Kept for backward: x, h and the norms' statistics; what the
convolutions and activations saw is never needed, since their weights do not train. Norms, embedding
and skip may train.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch
from kernels.attention import Attention, Conv, Norm, convolve, self_attention
from kernels.checks import check_groups, check_image, check_tensor
from kernels.frozen_block_passes import Inputs, backward, forward
from kernels.frozen_conv import check_frozen
from kernels.layout import to_channels_last
from kernels.norm_silu import group_norm_silu
from kernels.resample import resample2x

OP = "frozen_unet_block"
RESAMPLES = ("", "up", "down")


_TENSORS = "Tensor x, " + "".join(
    f"Tensor{'?' if name in ('pre_shift', 'scale', 'shift', 'skip_weight', 'skip_bias') else ''} "
    f"{name}, "
    for name in Inputs._fields[1:14]
)
_SCHEMA = (
    _TENSORS + "int groups0, int groups1, float eps0, float eps1, str resample, float[] taps, "
    "float gain"
)
# One gradient of weight and bias together for each norm, see group_norm_silu_backward.
_GRADIENTS = ("x", "affine0", "affine1", "pre_shift", "scale", "shift", "skip_weight", "skip_bias")


def frozen_unet_block_ref(*args: object, **options: object) -> Tensor:
    """The definition: the same block with every op as its own definition."""
    with dispatch.twice_differentiable():
        return frozen_unet_block(*args, **options)  # type: ignore[arg-type]


_op = torch.library.custom_op(
    "fastgan::frozen_unet_block",
    lambda *args: forward(Inputs(*args)),
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "fastgan::frozen_unet_block_backward",
    lambda dy, h, statistics0, statistics1, wanted, *args: backward(
        dy, Inputs(*args), h, statistics0, statistics1, wanted
    ),
    mutates_args=(),
    schema="(Tensor dy, Tensor h, Tensor statistics0, Tensor statistics1, str wanted, "
    f"{_SCHEMA}) -> Tensor[]",
)


@_op.register_fake
def _(*args):
    i = Inputs(*args)
    n, _, height, width = i.x.shape
    if i.resample:
        height, width = (2 * s if i.resample == "up" else s // 2 for s in (height, width))
    y = i.x.new_empty(n, i.conv1_weight.shape[0], height, width)
    y = y.contiguous(memory_format=torch.channels_last)
    statistics = (i.x.new_empty(2, n, g, dtype=torch.float32) for g in (i.groups0, i.groups1))
    return y, torch.empty_like(y), *statistics


@_backward_op.register_fake
def _(dy, h, statistics0, statistics1, wanted, *args):
    i = Inputs(*args)
    widths = {"affine0": i.x.shape[1], "affine1": h.shape[1]}
    return [
        i.x.new_empty(2, widths[name], dtype=torch.float32)
        if name in widths
        else torch.empty_like(getattr(i, name))
        for name in wanted.split()
    ]


def _setup(ctx, inputs, output):
    _, h, statistics0, statistics1 = output
    ctx.settings = inputs[14:]
    ctx.save_for_backward(h, statistics0, statistics1, *inputs[:14])


def _autograd(ctx, dy, *_):
    h, statistics0, statistics1, *tensors = ctx.saved_tensors
    i = Inputs(*tensors, *ctx.settings)
    needed = dict(zip(Inputs._fields, ctx.needs_input_grad, strict=True))
    needed["affine0"] = needed["norm0_weight"] or needed["norm0_bias"]
    needed["affine1"] = needed["norm1_weight"] or needed["norm1_bias"]
    wanted = [name for name in _GRADIENTS if needed[name]]
    arguments = (dy, h, statistics0, statistics1, " ".join(wanted), *i)
    found = dict(zip(wanted, _backward_op(*arguments), strict=True))
    for norm in "01":
        for row, part in enumerate(("weight", "bias")):
            name = f"norm{norm}_{part}"
            if needed[name]:
                found[name] = found[f"affine{norm}"][row].to(getattr(i, name).dtype)
    return tuple(found.get(name) for name in Inputs._fields)


_op.register_autograd(_autograd, setup_context=_setup)


def frozen_unet_block(
    x: Tensor,
    norm0: Norm,
    conv0: Conv,
    norm1: Norm,
    conv1: Conv,
    *,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Conv | None = None,
    resample: str = "",
    filter: tuple[float, ...] = (1, 1),
    gain: float = 1.0,
    dropout: float = 0.0,
    attention: Attention | None = None,
) -> Tensor:
    """A UNet's residual block and, where given, the self-attention behind it.

    x [N, Cin, H, W]; conv0 [Cout, Cin, 3, 3], conv1 [Cout, Cout, 3, 3], skip [Cout, Cin, 1, 1] in
    x's dtype; pre_shift, scale, shift [N, Cout] from the embedding; `resample` "", "up" or "down"
    with the taps `filter`. One fused op when conv0 and conv1 are frozen and nothing is dropped;
    otherwise the same block composed of this package's ops and PyTorch's. ValueError names what
    does not fit.
    """
    check_image("x", x)
    if resample not in RESAMPLES:
        raise ValueError(f"resample is {resample!r}, one of {RESAMPLES} would do")
    embedding = {"pre_shift": pre_shift, "scale": scale, "shift": shift}
    body = (x, norm0, conv0, norm1, conv1, embedding, skip, resample, filter, gain)
    frozen = not (conv0.trains or conv1.trains or dropout)
    if frozen and dispatch.implementation(OP, x.device.type, x.dtype) == "triton":
        y = _fused(*body)
    else:
        y = _composed(*body, dropout)
    return y if attention is None else self_attention(y, attention, gain)


def _composed(
    x: Tensor,
    norm0: Norm,
    conv0: Conv,
    norm1: Norm,
    conv1: Conv,
    embedding: dict[str, Tensor | None],
    skip: Conv | None,
    resample: str,
    filter: tuple[float, ...],
    gain: float,
    dropout: float,
) -> Tensor:
    h = group_norm_silu(x, norm0.groups, norm0.weight, norm0.bias, eps=norm0.eps)
    if resample:
        h = resample2x(h, filter, up=resample == "up")
        x = resample2x(x, filter, up=resample == "up")
    h = convolve(h, conv0)
    h = group_norm_silu(
        h,
        norm1.groups,
        norm1.weight,
        norm1.bias,
        eps=norm1.eps,
        pre_shift=embedding["pre_shift"],
        scale=embedding["scale"],
        shift=embedding["shift"],
    )
    h = convolve(F.dropout(h, dropout, training=dropout > 0), conv1)
    return (h + (x if skip is None else convolve(x, skip))) * gain


def _fused(
    x: Tensor,
    norm0: Norm,
    conv0: Conv,
    norm1: Norm,
    conv1: Conv,
    embedding: dict[str, Tensor | None],
    skip: Conv | None,
    resample: str,
    filter: tuple[float, ...],
    gain: float,
) -> Tensor:
    n, width = len(x), conv1.weight.shape[0]
    check_groups("norm0.groups", norm0.groups, x)
    check_groups("norm1.groups", norm1.groups, conv1.weight)
    check_tensor("conv0.weight", conv0.weight, (width, x.shape[1], 3, 3), x)
    check_tensor("conv1.weight", conv1.weight, (width, width, 3, 3), x)
    for name, conv in (("conv0", conv0), ("conv1", conv1)):
        check_frozen(f"{name}.weight", conv.weight, x)
        check_frozen(f"{name}.bias", conv.bias, x)
    per_sample = []
    for name, value in embedding.items():
        check_tensor(name, value, (n, width), x)
        per_sample.append(None if value is None else value.expand(n, width))
    if skip is not None:
        check_tensor("skip.weight", skip.weight, (width, x.shape[1], 1, 1), x)
    return _op(
        *(to_channels_last(x), norm0.weight, norm0.bias, norm1.weight, norm1.bias, *per_sample),
        *((None, None) if skip is None else skip),
        *(*conv0, *conv1, norm0.groups, norm1.groups, norm0.eps, norm1.eps),
        *(resample, list(map(float, filter)), gain),
    )[0]
