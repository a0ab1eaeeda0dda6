"""The residual block with optional attention that both UNets are built from."""

from collections.abc import Sequence
from functools import partial

import torch
from fastgan_kernels import Attention, frozen_unet_block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgan.models.layers import FAN_IN, Conv2d, GroupNorm, Init, Linear


class UNetBlock(nn.Module):
    """norm, SiLU, convolution, embedding, norm, SiLU, convolution, skip; then attention.

    x [N, in, H, W], emb [N, emb_channels] -> [N, out, H', W'], H' = H, 2H (up) or H/2 (down).
    `adaptive_scale` (ADM): the embedding scales and shifts the second norm's output; otherwise it
    is added before that norm (SongUNet). `num_heads` None derives it from `channels_per_head`.
    """

    recomputed = False
    """Whether autograd keeps x and emb alone, and backward computes the block again."""

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
        heads = out_channels // channels_per_head if num_heads is None else num_heads
        self.num_heads = heads if attention else 0
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        self.resample, self.taps = "up" if up else "down" if down else "", tuple(resample_filter)

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
        if not (self.recomputed and torch.is_grad_enabled()):
            return self._compute(x, emb)
        # Nothing in it is random: no generator's state is read, which a CUDA graph could not.
        return checkpoint(self._compute, x, emb, use_reentrant=False, preserve_rng_state=False)

    def _compute(self, x: Tensor, emb: Tensor) -> Tensor:
        dtype = x.dtype
        # The affine map runs in the embedding's float32 and is cast where it is used.
        params = self.affine(emb).to(dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            embedded = {"scale": scale, "shift": shift}
        else:
            embedded = {"pre_shift": params}
        skip = attention = None
        if self.skip is not None and self.skip.weight is not None:  # else at most resampled
            skip = self.skip.parameters_of_conv(dtype)
        if self.num_heads:
            attention = Attention(
                self.norm2.parameters_of_norm(),
                self.qkv.parameters_of_conv(dtype),
                self.proj.parameters_of_conv(dtype),
                self.num_heads,
            )
        return frozen_unet_block(
            x,
            self.norm0.parameters_of_norm(),
            self.conv0.parameters_of_conv(dtype),
            self.norm1.parameters_of_norm(),
            self.conv1.parameters_of_conv(dtype),
            **embedded,
            skip=skip,
            resample=self.resample,
            filter=self.taps,
            gain=self.skip_scale,
            dropout=self.dropout if self.training else 0.0,
            attention=attention,
        )


def recompute_blocks(network: nn.Module) -> None:
    """Activation checkpointing: every block of `network` keeps its input alone for backward.

    The gradients stay the same, for one more forward pass of the blocks. Blocks that drop out are
    refused by an assertion: the second pass would drop others.
    """
    for module in network.modules():
        if isinstance(module, UNetBlock):
            assert not module.dropout, "a block with dropout cannot be computed twice"
            module.recomputed = True
