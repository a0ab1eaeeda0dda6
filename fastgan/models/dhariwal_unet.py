"""DhariwalUNet: ADM (Dhariwal & Nichol 2021) as EDM parametrises it."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.models.layers import FAN_IN, Conv2d, GroupNorm, Linear, PositionalEmbedding
from fastgan.models.unet_block import UNetBlock


class DhariwalUNet(nn.Module):
    """The raw network F(c_in x; c_noise, labels) of EDM's preconditioning.

    Images are [N, C, H, W], c_noise [N], labels [N, label_dim]. 64 channels per attention head;
    a block of fewer channels has no attention.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, in_channels
        emb_channels = model_channels * channel_mult_emb
        silent = FAN_IN.scaled(0.0, bias=0.0)
        block = partial(UNetBlock, emb_channels=emb_channels, dropout=dropout, init_last=silent)

        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = (
            Linear(augment_dim, model_channels, bias=False, init=silent) if augment_dim else None
        )
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_label = Linear(label_dim, emb_channels, bias=False) if label_dim else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

        resolutions = [img_resolution >> level for level in range(len(channel_mult))]
        widths = [model_channels * mult for mult in channel_mult]

        self.enc = nn.ModuleDict()
        width, skips = widths[0], []
        for level, (resolution, out_width) in enumerate(zip(resolutions, widths, strict=True)):
            at = f"{resolution}x{resolution}"
            if level == 0:
                self.enc[f"{at}_conv"] = Conv2d(in_channels, width, 3)
            else:
                self.enc[f"{at}_down"] = block(width, width, down=True)
            skips.append(width)
            for i in range(num_blocks):
                attend = resolution in attn_resolutions
                self.enc[f"{at}_block{i}"] = block(width, out_width, attention=attend)
                width = out_width
                skips.append(width)

        self.dec = nn.ModuleDict()
        deepest = len(channel_mult) - 1
        for level in range(deepest, -1, -1):
            resolution, out_width = resolutions[level], widths[level]
            at = f"{resolution}x{resolution}"
            if level == deepest:
                self.dec[f"{at}_in0"] = block(width, width, attention=True)
                self.dec[f"{at}_in1"] = block(width, width)
            else:
                self.dec[f"{at}_up"] = block(width, width, up=True)
            for i in range(num_blocks + 1):
                attend = resolution in attn_resolutions
                self.dec[f"{at}_block{i}"] = block(width + skips.pop(), out_width, attention=attend)
                width = out_width
        self.out_norm = GroupNorm(width, eps=1e-5)
        self.out_conv = Conv2d(width, out_channels, 3, init=silent)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        emb = self.embed(c_noise, labels, augment_labels)
        x, skips = self.encode(x, emb)
        return self.decode(x, skips, emb)

    def embed(
        self, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The conditioning vector [N, emb_channels] that every block's affine map reads."""
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels)
        return F.silu(emb)

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The deepest map and the skips of every layer, shallow to deep."""
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        return x, skips

    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """The raw output [N, out_channels, H, W]; consumes `skips` from its end."""
        for layer in self.dec.values():
            if x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        assert not skips
        return self.out_conv(self.out_norm(x, act=True))
