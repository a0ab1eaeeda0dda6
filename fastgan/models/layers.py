"""The layers of EDM's UNets under the parameter names of the published checkpoints.

Parameters are float32 masters; each layer casts them to the dtype of its input, so that the same
module computes in float32, bf16 or (converted as a whole) float64. Arrays are [N, C, H, W] or
[N, C].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.errors import UserError
from fastgan.models.init import FAN_IN, Init


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged when it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Module):
    """x W^T + b on [N, in_features]."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, init: Init = FAN_IN
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        init.fill(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class GroupNorm(nn.Module):
    """Group normalisation with min(32, C // 4) groups, computed in float32 at least."""

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.num_groups = min(32, channels // 4)
        if not self.num_groups or channels % self.num_groups:
            raise UserError(
                f"{channels} channels do not split into {self.num_groups} groups of a GroupNorm, "
                "model_channels and channel_mult whose widths are multiples of 32 would"
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.group_norm(wide, self.num_groups, weight, bias, self.eps).to(x.dtype)


def resampling_kernel(taps: Sequence[float]) -> Tensor:
    """The separable low-pass kernel f f^T / (sum f)^2 as [1, 1, k, k] float32."""
    f = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(f, f) / f.sum().square())[None, None]


def downsample(x: Tensor, kernel: Tensor, *, padding: int) -> Tensor:
    """Filters each channel with `kernel` [1, 1, k, k] and keeps every second pixel."""
    channels = x.shape[1]
    kernel = kernel.to(x.dtype).expand(channels, 1, -1, -1)
    return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


def upsample(x: Tensor, kernel: Tensor, *, padding: int) -> Tensor:
    """The transpose of `downsample`, times 4 so that a constant image keeps its value."""
    channels = x.shape[1]
    kernel = (4 * kernel).to(x.dtype).expand(channels, 1, -1, -1)
    return F.conv_transpose2d(x, kernel, stride=2, padding=padding, groups=channels)


class Conv2d(nn.Module):
    """A k x k convolution, optionally preceded by 2x resampling; kernel 0 only resamples.

    `fused` (down only: NCSN++'s aux_residual) convolves first, padded so that the filter behind it
    needs no padding of its own.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
        init: Init = FAN_IN,
    ) -> None:
        super().__init__()
        assert not (up and down) and not (fused and not down)
        self.up, self.down, self.fused = up, down, fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
            init.fill(self.weight, self.bias)
        if up or down:
            self.register_buffer("resample_filter", resampling_kernel(resample_filter))
        self.filter_padding = (len(resample_filter) - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            x = self._convolve(x, extra_padding=self.filter_padding)
            return self._add_bias(downsample(x, self.resample_filter, padding=0))
        if self.up:
            x = upsample(x, self.resample_filter, padding=self.filter_padding)
        if self.down:
            x = downsample(x, self.resample_filter, padding=self.filter_padding)
        return self._add_bias(self._convolve(x))

    def _convolve(self, x: Tensor, extra_padding: int = 0) -> Tensor:
        if self.weight is None:
            return x
        padding = self.weight.shape[-1] // 2 + extra_padding
        return F.conv2d(x, self.weight.to(x.dtype), padding=padding)

    def _add_bias(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(1, -1, 1, 1)


class PositionalEmbedding(nn.Module):
    """[N] -> [N, channels]: [cos, sin] of c_noise times 10000^(-i / (channels/2 - endpoint))."""

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.channels // 2
        i = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device)
        frequencies = 10000 ** (-i / (half - int(self.endpoint)))
        angle = torch.outer(c_noise, frequencies)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[N] -> [N, channels]: [cos, sin] of 2 pi c_noise times fixed frequencies 16 N(0, 1)."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = torch.outer(c_noise, self.freqs.to(c_noise.dtype) * (2 * math.pi))
        return torch.cat([angle.cos(), angle.sin()], dim=1)
