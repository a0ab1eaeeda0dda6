"""The UNets of Song et al. 2021 and Dhariwal & Nichol 2021 as EDM parametrises them."""

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.models.layers import (
    FAN_IN,
    XAVIER,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
)
from fastgan.models.unet_block import UNetBlock


class UNet(nn.Module):
    """The raw network F(c_in x; c_noise, labels) of EDM's preconditioning.

    Images are [N, C, H, W], c_noise [N], labels [N, label_dim]. Layers have the published names.
    """

    enc: nn.ModuleDict
    embed: Callable[..., Tensor]
    decode: Callable[..., Tensor]

    def __init__(
        self, size: int, channels: int, widths: Sequence[int], attn_resolutions: Sequence[int]
    ) -> None:
        super().__init__()
        self.img_resolution, self.img_channels = size, channels
        sizes = [size >> level for level in range(len(widths))]
        # Shallow to deep: name, whether its blocks attend, width.
        self.levels = [
            (f"{s}x{s}", s in attn_resolutions, w) for s, w in zip(sizes, widths, strict=True)
        ]

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

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The deepest map and the skips of every layer, shallow to deep; NCSN++ has aux layers."""
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) / sqrt(2)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        return x, skips


class SongUNet(UNet):
    """DDPM++ and NCSN++ (Song et al. 2021).

    DDPM++ is positional / standard / [1, 1] / channel_mult_noise 1; NCSN++ is fourier / residual /
    [1, 3, 3, 1] / channel_mult_noise 2.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        widths = [model_channels * mult for mult in channel_mult]
        super().__init__(img_resolution, in_channels, widths, attn_resolutions)
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        block = partial(
            UNetBlock,
            emb_channels=emb_channels,
            num_heads=1,
            dropout=dropout,
            skip_scale=sqrt(0.5),
            eps=1e-6,
            resample_filter=resample_filter,
            resample_proj=True,
            adaptive_scale=False,
            init=XAVIER,
            init_last=XAVIER.scaled(1e-5),
            init_attn=XAVIER.scaled(sqrt(0.2)),
        )
        resample = partial(Conv2d, resample_filter=resample_filter, init=XAVIER)

        self.map_noise: nn.Module = (
            FourierEmbedding(noise_channels)
            if embedding_type == "fourier"
            else PositionalEmbedding(noise_channels, endpoint=True)
        )
        self.map_label = Linear(label_dim, noise_channels, init=XAVIER) if label_dim else None
        self.map_augment = (
            Linear(augment_dim, noise_channels, bias=False, init=XAVIER) if augment_dim else None
        )
        self.map_layer0 = Linear(noise_channels, emb_channels, init=XAVIER)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=XAVIER)

        self.enc = nn.ModuleDict()
        skips: list[int] = []
        width, aux_width = model_channels, in_channels
        for at, attend, out_width in self.levels:
            if not skips:
                self.enc[f"{at}_conv"] = Conv2d(in_channels, width, 3, init=XAVIER)
            else:
                self.enc[f"{at}_down"] = block(width, width, down=True)
                if encoder_type == "skip":
                    self.enc[f"{at}_aux_down"] = resample(aux_width, aux_width, 0, down=True)
                    self.enc[f"{at}_aux_skip"] = Conv2d(aux_width, width, 1, init=XAVIER)
                if encoder_type == "residual":
                    self.enc[f"{at}_aux_residual"] = resample(
                        aux_width, width, 3, down=True, fused=True
                    )
                    aux_width = width
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{at}_block{i}"] = block(width, out_width, attention=attend)
                width = out_width
                skips.append(width)

        self.dec = nn.ModuleDict()
        for at, attend, out_width in reversed(self.levels):
            deepest = not self.dec
            if deepest:
                self.dec[f"{at}_in0"] = block(width, width, attention=True)
                self.dec[f"{at}_in1"] = block(width, width)
            else:
                self.dec[f"{at}_up"] = block(width, width, up=True)
            for i in range(num_blocks + 1):
                last = i == num_blocks
                self.dec[f"{at}_block{i}"] = block(
                    width + skips.pop(), out_width, attention=attend and last
                )
                width = out_width
            if decoder_type == "skip" or not skips:
                if decoder_type == "skip" and not deepest:
                    self.dec[f"{at}_aux_up"] = resample(out_channels, out_channels, 0, up=True)
                self.dec[f"{at}_aux_norm"] = GroupNorm(width, eps=1e-6)
                self.dec[f"{at}_aux_conv"] = Conv2d(
                    width, out_channels, 3, init=XAVIER.scaled(1e-5)
                )

    def embed(
        self, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The conditioning vector [N, emb_channels] that every block's affine map reads."""
        cos, sin = self.map_noise(c_noise).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels * sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """The raw output [N, out_channels, H, W]; consumes `skips` from its end."""
        out: Tensor | None = None
        activated = x
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                activated = layer(x, act=True)
            elif "aux_conv" in name:
                contribution = layer(activated)
                out = contribution if out is None else out + contribution
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        assert out is not None and not skips
        return out


class DhariwalUNet(UNet):
    """ADM (Dhariwal & Nichol 2021).

    64 channels per attention head; a block of fewer channels has no attention.
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
        widths = [model_channels * mult for mult in channel_mult]
        super().__init__(img_resolution, in_channels, widths, attn_resolutions)
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

        self.enc = nn.ModuleDict()
        skips: list[int] = []
        width = widths[0]
        for at, attend, out_width in self.levels:
            if not skips:
                self.enc[f"{at}_conv"] = Conv2d(in_channels, width, 3)
            else:
                self.enc[f"{at}_down"] = block(width, width, down=True)
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{at}_block{i}"] = block(width, out_width, attention=attend)
                width = out_width
                skips.append(width)

        self.dec = nn.ModuleDict()
        for at, attend, out_width in reversed(self.levels):
            if not self.dec:
                self.dec[f"{at}_in0"] = block(width, width, attention=True)
                self.dec[f"{at}_in1"] = block(width, width)
            else:
                self.dec[f"{at}_up"] = block(width, width, up=True)
            for i in range(num_blocks + 1):
                self.dec[f"{at}_block{i}"] = block(width + skips.pop(), out_width, attention=attend)
                width = out_width
        self.out_norm = GroupNorm(width, eps=1e-5)
        self.out_conv = Conv2d(width, out_channels, 3, init=silent)

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

    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """The raw output [N, out_channels, H, W]; consumes `skips` from its end."""
        for layer in self.dec.values():
            if x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        assert not skips
        return self.out_conv(self.out_norm(x, act=True))
