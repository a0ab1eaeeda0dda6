"""The layers of EDM's UNets under the parameter names of the published checkpoints.

Parameters are float32 masters; each layer casts them to the dtype of its input, so that the same
module computes in float32, bf16 or (converted as a whole) float64. What a layer computes is in
`kernels`, whose ops are plain PyTorch on the CPU. Arrays are [N, C, H, W] or [N, C].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from fastgan_kernels import Conv, Norm, group_norm_silu, resample2x
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.common.errors import UserError


@dataclass(frozen=True)
class Init:
    """A uniform distribution of weights and biases, scaled by the layer's fans.

    mode `xavier`: U(+-sqrt(6 / (fan_in + fan_out))); `fan_in`: U(+-1 / sqrt(fan_in)). `weight` and
    `bias` multiply the bound; both fans of a k x k convolution contain k^2.
    """

    mode: Literal["xavier", "fan_in"] = "fan_in"
    weight: float = 1.0
    bias: float = 1.0

    def scaled(self, weight: float, bias: float | None = None) -> "Init":
        """The same distribution with other multipliers (zero keeps the branch silent at start)."""
        return replace(self, weight=weight, bias=self.bias if bias is None else bias)

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Draws `weight` [out, in, ...] and `bias` [out] in place from the global generator."""
        fan_out, fan_in = weight.shape[0], weight[0].numel()
        if self.mode == "xavier":
            fan_out *= weight[0, 0].numel()
            bound = math.sqrt(6 / (fan_in + fan_out))
        else:
            bound = 1 / math.sqrt(fan_in)
        weight.uniform_(-bound, bound).mul_(self.weight)
        if bias is not None:
            bias.uniform_(-bound, bound).mul_(self.bias)


XAVIER = Init("xavier", bias=0.0)
FAN_IN = Init("fan_in")


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
    """Group normalisation with min(32, C // 4) groups, then SiLU if `act`; float32 at least."""

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

    def forward(self, x: Tensor, *, act: bool = False) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, eps=self.eps, act=act)

    def parameters_of_norm(self) -> Norm:
        """As the fused ops take them."""
        return Norm(self.weight, self.bias, self.num_groups, self.eps)


class Conv2d(nn.Module):
    """A k x k convolution, optionally preceded by 2x resampling; kernel 0 only resamples.

    The resampling filter is f f^T / (sum f)^2 of the taps f, `resample_filter`. `fused` (down only:
    NCSN++'s aux_residual) convolves first, padded so that the filter behind needs no padding.
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
            f = torch.tensor(resample_filter, dtype=torch.float32)
            self.register_buffer("resample_filter", (f.outer(f) / f.sum().square())[None, None])
        self.taps = tuple(map(float, resample_filter))
        self._cast: tuple[tuple[object, ...], Conv] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if (self.up or self.down) and not self.fused:
            x = resample2x(x, self.taps, up=self.up)
        if self.weight is not None:
            extra = (len(self.taps) - 1) // 2 if self.fused else 0
            x = F.conv2d(x, self.weight.to(x.dtype), padding=self.weight.shape[-1] // 2 + extra)
        if self.fused:
            channels = x.shape[1]
            each = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
            x = F.conv2d(x, each, stride=2, groups=channels)
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(1, -1, 1, 1)

    def parameters_of_conv(self, dtype: torch.dtype) -> Conv:
        """Weight and bias in `dtype`, as the fused ops take them.

        A frozen pair is cast, and laid out channels_last on a GPU, once and not at every use.
        """
        weight, bias = self.weight, self.bias
        assert weight is not None and bias is not None, "kernel 0 only resamples"
        trains = weight.requires_grad or bias.requires_grad
        as_it_is = weight.dtype == dtype and not weight.is_cuda
        if trains or as_it_is:
            return Conv(weight.to(dtype), bias.to(dtype))
        if torch.compiler.is_compiling():
            # Graphs cannot look at addresses: whoever compiles has cast before (cast_frozen).
            if self._cast is not None and self._cast[1].weight.dtype == dtype:
                return self._cast[1]
            return Conv(weight.to(dtype), bias.to(dtype))
        # In-place changes (a loaded checkpoint) and moves to another device make a new copy.
        key = (dtype, weight.data_ptr(), weight._version, bias.data_ptr(), bias._version)
        if self._cast is None or self._cast[0] != key:
            layout = torch.channels_last if weight.is_cuda else torch.preserve_format
            copy = weight.detach().to(dtype, memory_format=layout)
            self._cast = (key, Conv(copy, bias.detach().to(dtype)))
        return self._cast[1]


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Makes every frozen convolution's copy in `dtype` now, for graphs that are compiled later.

    They keep reading these copies: weights loaded after that need another call.
    """
    for module in network.modules():
        if isinstance(module, Conv2d) and module.weight is not None:
            module.parameters_of_conv(dtype)


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
