"""Self-attention over pixels, with its norm and projections, as the last part of a UNet block.

    y = gain (x + proj(softmax(q k^T / sqrt(d)) v)),   q, k, v = qkv(GroupNorm(x))

x [N, C, H, W]; heads of d = C / heads channels. The published qkv weight interleaves q, k and v
fastest: row = head 3d + 3 channel + {0, 1, 2}. Reordering the weight's rows, rather than the
activations, hands the library dense heads.
"""

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan_kernels import dispatch
from fastgan_kernels.frozen_conv import frozen_conv2d
from fastgan_kernels.norm_silu import group_norm_silu
from fastgan_kernels.runtime import to_channels_last

OP = "attention"


class Norm(NamedTuple):
    """Parameters of a GroupNorm: weight and bias [C]."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float


class Conv(NamedTuple):
    """Parameters of a convolution in the compute dtype: weight [Cout, Cin, k, k], bias [Cout]."""

    weight: Tensor
    bias: Tensor

    @property
    def trains(self) -> bool:
        return any(p.requires_grad for p in self) and torch.is_grad_enabled()


class Attention(NamedTuple):
    """Norm, 1x1 qkv [3C, C, 1, 1], 1x1 output projection, number of heads."""

    norm: Norm
    qkv: Conv
    proj: Conv
    heads: int


def convolve(x: Tensor, conv: Conv) -> Tensor:
    """`Same` convolution; without a weight gradient and saved input where the weight is frozen."""
    padding = conv.weight.shape[-1] // 2
    run = F.conv2d if conv.trains else frozen_conv2d
    return run(x, conv.weight, conv.bias, stride=1, padding=padding)


def attention_ref(qkv: Tensor, heads: int) -> Tensor:
    """The definition on the published channel order: [N, 3C, H, W] -> [N, C, H, W].

    Softmax in float32 at least. Spelled out: the library's kernels have no second derivative.
    """
    n, channels, height, width = qkv.shape
    depth = channels // (3 * heads)
    q, k, v = qkv.reshape(n * heads, depth, 3, height * width).unbind(2)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    scores = q.to(wide).transpose(1, 2) @ k.to(wide) / sqrt(depth)
    weights = scores.softmax(dim=2).to(v.dtype)
    return (v @ weights.transpose(1, 2)).reshape(n, channels // 3, height, width)


def self_attention(x: Tensor, a: Attention, gain: float) -> Tensor:
    """gain (x + attention) for x [N, C, H, W]."""
    heads = a.heads
    z = group_norm_silu(x, a.norm.groups, *a.norm[:2], eps=a.norm.eps, act=False)
    chosen = dispatch.implementation(OP, x.device.type, x.dtype)
    if chosen == "reference":
        mixed = attention_ref(convolve(z, a.qkv), heads)
    else:
        run = _sdpa if chosen == "library" else dispatch.xformers_attention()
        mixed = _dense_heads(convolve(z, _reordered(a.qkv, heads)), heads, run)
    return (x + convolve(mixed, a.proj)) * gain


def _reordered(qkv: Conv, heads: int) -> Conv:
    """The same projection with all of q first, then k, then v, each head by head."""

    def reorder(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)

    return Conv(reorder(qkv.weight), reorder(qkv.bias))


def _dense_heads(qkv: Tensor, heads: int, run) -> Tensor:
    """`run(q, k, v)` over [N, H W, heads, d] views of a channels_last [N, 3C, H, W]."""
    n, _, height, width = qkv.shape
    # Neither fused attention takes heads whose elements are not neighbours.
    pixels = to_channels_last(qkv).movedim(1, 3).reshape(n, height * width, 3, heads, -1)
    mixed = run(*pixels.unbind(2))
    return mixed.reshape(n, height, width, -1).movedim(3, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
