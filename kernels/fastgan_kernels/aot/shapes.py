"""The shapes of the published networks, for benchmarks and ahead-of-time builds.

A test compares these tables with the networks themselves. CIFAR-10's conditional network has the
shapes of the unconditional one, AFHQv2's those of FFHQ's.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """`count` residual blocks of one shape: channels in and out, pixels a side of the input."""

    cin: int
    cout: int
    size: int
    resample: str = ""
    heads: int = 0
    count: int = 1

    @property
    def out_size(self) -> int:
        return {"": self.size, "up": 2 * self.size, "down": self.size // 2}[self.resample]


@dataclass(frozen=True)
class Norm:
    """A group norm: channels, pixels a side, SiLU or not, and what of the embedding it takes."""

    channels: int
    size: int
    act: bool
    embedding: str
    groups: int = 32


@dataclass(frozen=True)
class Network:
    """A published network; `batch`: images per forward pass to measure with."""

    name: str
    resolution: int
    adm: bool
    filter: tuple[int, ...]
    last_norm: int
    batch: int
    blocks: tuple[Block, ...]

    @property
    def embedding(self) -> str:
        """What a block's second norm takes."""
        return "scale shift" if self.adm else "pre_shift"

    def projects(self, block: Block) -> bool:
        """Whether the block's skip convolves (1 x 1)."""
        return block.cin != block.cout or (bool(block.resample) and not self.adm)

    def norms(self) -> Counter[Norm]:
        """Every group norm with its number."""
        found = Counter({Norm(self.last_norm, self.resolution, True, ""): 1})
        for block in self.blocks:
            kinds = [
                Norm(block.cin, block.size, True, ""),
                Norm(block.cout, block.out_size, True, self.embedding),
            ]
            if block.heads:
                kinds.append(Norm(block.cout, block.out_size, False, ""))
            for norm in kinds:
                found[norm] += block.count
        return found

    def convolutions(self) -> Counter[tuple[int, int, int, int]]:
        """Every convolution that D2O-F freezes as (channels in, out, pixels a side, kernel)."""
        found: Counter[tuple[int, int, int, int]] = Counter()
        for block in self.blocks:
            found[block.cin, block.cout, block.out_size, 3] += block.count
            found[block.cout, block.cout, block.out_size, 3] += block.count
            if block.heads:
                found[block.cout, block.cout, block.out_size, 1] += block.count
        return found

    def resamplings(self) -> Iterator[tuple[int, int, str]]:
        """(channels, pixels a side, direction) in front of the first convolutions."""
        return ((b.cin, b.size, b.resample) for b in self.blocks if b.resample)


_DDPMPP_BELOW_32 = (
    Block(256, 256, 16, heads=1, count=4),
    Block(256, 256, 16, "down"),
    Block(256, 256, 16, "up"),
    Block(512, 256, 16, count=4),
    Block(512, 256, 16, heads=1),
    Block(256, 256, 8, count=5),
    Block(256, 256, 8, heads=1),
    Block(256, 256, 8, "up"),
    Block(512, 256, 8, count=5),
)
CIFAR10 = Network(
    "CIFAR-10",
    resolution=32,
    adm=False,
    filter=(1, 3, 3, 1),
    last_norm=256,
    batch=64,
    blocks=(
        Block(128, 256, 32),
        Block(256, 256, 32, count=3),
        Block(256, 256, 32, "down"),
        Block(384, 256, 32),
        Block(512, 256, 32, count=4),
        *_DDPMPP_BELOW_32,
    ),
)
FFHQ = Network(
    "FFHQ-64",
    resolution=64,
    adm=False,
    filter=(1, 3, 3, 1),
    last_norm=128,
    batch=32,
    blocks=(
        Block(128, 128, 64, count=4),
        Block(128, 128, 64, "down"),
        Block(256, 128, 64, count=4),
        Block(384, 128, 64),
        Block(128, 256, 32),
        Block(256, 256, 32, count=3),
        Block(256, 256, 32, "down"),
        Block(256, 256, 32, "up"),
        Block(384, 256, 32),
        Block(512, 256, 32, count=4),
        *_DDPMPP_BELOW_32,
    ),
)
IMAGENET = Network(
    "ImageNet-64",
    resolution=64,
    adm=True,
    filter=(1, 1),
    last_norm=192,
    batch=32,
    blocks=(
        Block(192, 192, 64, count=3),
        Block(192, 192, 64, "down"),
        Block(384, 192, 64, count=3),
        Block(576, 192, 64),
        Block(192, 384, 32, heads=6),
        Block(384, 384, 32, heads=6, count=2),
        Block(384, 384, 32, "down"),
        Block(384, 384, 32, "up"),
        Block(576, 384, 32, heads=6),
        Block(768, 384, 32, heads=6, count=2),
        Block(960, 384, 32, heads=6),
        Block(384, 576, 16, heads=9),
        Block(576, 576, 16, heads=9, count=2),
        Block(576, 576, 16, "down"),
        Block(576, 576, 16, "up"),
        Block(960, 576, 16, heads=9),
        Block(1152, 576, 16, heads=9, count=2),
        Block(1344, 576, 16, heads=9),
        Block(576, 768, 8, heads=12),
        Block(768, 768, 8),
        Block(768, 768, 8, heads=12, count=3),
        Block(768, 768, 8, "up"),
        Block(1344, 768, 8, heads=12),
        Block(1536, 768, 8, heads=12, count=3),
    ),
)
NETWORKS = (CIFAR10, FFHQ, IMAGENET)
