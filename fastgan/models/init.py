"""Initial weights for training from scratch (EDM's choices, METHOD: Xavier for SongUNet)."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


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
