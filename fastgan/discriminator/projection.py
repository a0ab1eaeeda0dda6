"""Frozen random mixing of a backbone's feature levels (Projected GAN, section 3.2 there).

Across channels: a 1x1 convolution per level. Across scales, from the deepest level upwards: add the
deeper level's result, upsample, 1x1 convolution. Both stay at PyTorch's default initialisation.
The published runs draw another mixing on each GPU and never save it; ours is one, saved with D.
"""

from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (64, 128, 256, 512)


class RandomProjection(nn.Module):
    """Mixes feature maps [N, channels[i], H_i, W_i], shallow to deep, each about half as large.

    Returns maps of the sizes of the next shallower ones (the first: twice its own) with
    `out_channels` channels: widths[0], then widths[:-1]. Parameters carry the published names;
    construct within `seeded`. Always frozen, in eval mode.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        assert len(channels) == len(widths)
        self.levels = len(channels)
        self.out_channels = [widths[0], *widths[:-1]]
        for level, (in_channels, width) in enumerate(zip(channels, widths, strict=True)):
            self.add_module(f"layer{level}_ccm", nn.Conv2d(in_channels, width, 1))
        for level in reversed(range(self.levels)):
            self.add_module(
                f"layer{level}_csm", _CrossScaleMixing(widths[level], self.out_channels[level])
            )
        self.requires_grad_(False).eval()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Mixed maps, shallow to deep."""
        height, width = features[0].shape[2:]
        sizes = [(2 * height, 2 * width), *(x.shape[2:] for x in features[:-1])]
        mixed: list[Tensor] = []
        for level in reversed(range(self.levels)):
            x = self.get_submodule(f"layer{level}_ccm")(features[level])
            if mixed:
                x = x + mixed[0]
            mixed.insert(0, self.get_submodule(f"layer{level}_csm")(x, sizes[level]))
        return mixed

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode whatever is asked."""
        return super().train(False)


class _CrossScaleMixing(nn.Module):
    """Upsampling (corners aligned) and a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        # By size, not by factor: some networks' maps do not halve exactly (25 to 12).
        x = F.interpolate(x, size, mode="bilinear", align_corners=True)
        return self.out_conv(x)
