"""The residual block with optional attention that both UNets are built from."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.models.init import FAN_IN, Init
from fastgan.models.layers import Conv2d, GroupNorm, Linear, at_least_float32


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Self-attention over pixels; qkv [N, 3C, H, W] -> [N, C, H, W].

    q, k and v interleave fastest: channel = head x 3d + 3c + {0, 1, 2}. Softmax in float32.
    Spelled out rather than by scaled_dot_product_attention, which has no second derivative on the
    CPU, and R1 differentiates twice through a UNet encoder used as feature network.
    """
    n, channels, height, width = qkv.shape
    depth = channels // (3 * num_heads)
    q, k, v = qkv.reshape(n * num_heads, depth, 3, height * width).unbind(2)
    scores = at_least_float32(q.transpose(1, 2)) @ at_least_float32(k) / math.sqrt(depth)
    weights = scores.softmax(dim=2).to(v.dtype)
    return (v @ weights.transpose(1, 2)).reshape(n, channels // 3, height, width)


class UNetBlock(nn.Module):
    """norm, SiLU, convolution, embedding, norm, SiLU, convolution, skip; then attention.

    x [N, in, H, W], emb [N, emb_channels] -> [N, out, H', W'], H' = H, 2H (up) or H/2 (down).
    `adaptive_scale` (ADM): the embedding scales and shifts the second norm's output; otherwise it
    is added before that norm (SongUNet). `num_heads` None derives it from `channels_per_head`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Init = FAN_IN,
        init_last: Init | None = None,
        init_attn: Init | None = None,
    ) -> None:
        super().__init__()
        init_last, init_attn = init_last or init, init_attn or init
        if not attention:
            self.num_heads = 0
        else:
            self.num_heads = out_channels // channels_per_head if num_heads is None else num_heads
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale

        resampled = partial(Conv2d, up=up, down=down, resample_filter=resample_filter, init=init)
        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = resampled(in_channels, out_channels, 3)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=init_last)

        self.skip: Conv2d | None = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = resampled(in_channels, out_channels, kernel)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init=init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, init=init_last)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self._normalise_with_embedding(h, emb))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            a = attention(self.qkv(self.norm2(x)), self.num_heads)
            x = (x + self.proj(a)) * self.skip_scale
        return x

    def _normalise_with_embedding(self, h: Tensor, emb: Tensor) -> Tensor:
        # The affine map runs in the embedding's float32 and is cast where it is used.
        params = self.affine(emb)[:, :, None, None].to(h.dtype)
        if not self.adaptive_scale:
            return self.norm1(h + params)
        scale, shift = params.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm1(h), 1 + scale)
