"""What is measured: every op at every shape of the published networks, at real batch sizes."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from fastgan_kernels.aot.shapes import NETWORKS, Block, Network, Norm

DIRECTIONS = ("forward", "backward")
# Without these three a case cannot be compared; others (apex) are welcome.
REQUIRED = ("eager", "compile", "ours")


@dataclass(frozen=True)
class Conv:
    """A frozen convolution of `kernel` x `kernel` pixels."""

    cin: int
    cout: int
    size: int
    kernel: int


@dataclass(frozen=True)
class NormConv:
    """A block's 3 x 3 convolution and the norm in front; the second one's takes an embedding."""

    cin: int
    cout: int
    size: int
    embedding: str


@dataclass(frozen=True)
class Resampling:
    """In front of a block's first convolution; `direction` is "up" or "down"."""

    channels: int
    size: int
    direction: str


@dataclass(frozen=True)
class Images:
    """Generated images on their way to a backbone."""

    size: int


Shape = Norm | Block | Conv | NormConv | Resampling | Images


@dataclass(frozen=True)
class Case:
    """An op at one shape; `count`: how often it occurs in one pass of the network."""

    op: str
    network: Network
    label: str
    shape: Shape
    count: int = 1

    def __str__(self) -> str:
        return f"{self.network.name}-{self.label}"

    @property
    def batch(self) -> int:
        return self.network.batch

    @property
    def channels(self) -> int:
        """Channels of the input; of a block or convolution the more numerous of in and out."""
        match self.shape:
            case Norm() | Resampling():
                return self.shape.channels
            case Images():
                return 3
        return max(self.shape.cin, self.shape.cout)

    @property
    def pixels(self) -> int:
        """Of one channel of the input."""
        return self.shape.size**2


def norms(network: Network) -> list[Case]:
    """A label's last word is what the norm takes of the embedding, or `linear` without SiLU."""
    found = []
    for norm, count in network.norms().items():
        extra = "linear" if not norm.act else norm.embedding.replace(" ", "_")
        label = f"C{norm.channels}-{norm.size}px" + (f"-{extra}" if extra else "")
        found.append(Case("group_norm_silu", network, label, norm, count))
    return found


def convolutions(network: Network) -> list[Case]:
    return [
        Case("frozen_conv2d", network, f"{i}to{o}-{size}px-{k}x{k}", Conv(i, o, size, k), count)
        for (i, o, size, k), count in network.convolutions().items()
    ]


def norm_convolutions(network: Network) -> list[Case]:
    """Where nothing is resampled in between; a label's last word is what the norm takes."""
    found: Counter[NormConv] = Counter()
    for b in network.blocks:
        if not b.resample:
            found[NormConv(b.cin, b.cout, b.size, "")] += b.count
        found[NormConv(b.cout, b.cout, b.out_size, network.embedding)] += b.count
    return [
        Case(
            "norm_silu_conv",
            network,
            f"{c.cin}to{c.cout}-{c.size}px-{c.embedding.replace(' ', '_') or 'plain'}",
            c,
            count,
        )
        for c, count in found.items()
    ]


def blocks(network: Network) -> list[Case]:
    """Residual blocks without attention, which is the same library call in every candidate."""
    found: Counter[Block] = Counter()
    for block in network.blocks:
        found[replace(block, heads=0, count=1)] += block.count
    return [
        Case(
            "frozen_unet_block",
            network,
            f"{b.cin}to{b.cout}-{b.size}px" + (f"-{b.resample}" if b.resample else ""),
            b,
            count,
        )
        for b, count in found.items()
    ]


def resamplings(network: Network) -> list[Case]:
    found = Counter(Resampling(*each) for each in network.resamplings())
    return [
        Case("resample2x", network, f"C{r.channels}-{r.size}px-{r.direction}", r, count)
        for r, count in found.items()
    ]


def images(network: Network) -> list[Case]:
    size = network.resolution
    return [Case("resize_normalize", network, f"{size}px", Images(size))]


TABLES: dict[str, Callable[[Network], list[Case]]] = {
    "group_norm_silu": norms,
    "frozen_conv2d": convolutions,
    "norm_silu_conv": norm_convolutions,
    "frozen_unet_block": blocks,
    "resample2x": resamplings,
    "resize_normalize": images,
}


def published(op: str) -> list[Case]:
    """Every case of `op`, network by network."""
    return [case for network in NETWORKS for case in TABLES[op](network)]


def tiny(cases: Iterable[Case]) -> list[Case]:
    """One case of each kind per network, small and of one image: to try the code, not to time."""
    found: dict[tuple[str, object], Case] = {}
    for case in cases:
        network = replace(case.network, batch=1)
        changes: Any = {"size": min(4, case.shape.size), **_narrow(case.shape)}
        small = replace(case, network=network, shape=replace(case.shape, **changes))
        found.setdefault((network.name, _kind(case)), replace(small, label=f"tiny-{case.label}"))
    return list(found.values())


def _narrow(shape: Shape) -> dict[str, int]:
    """A quarter of the channels, in multiples of the 32 groups; different ones stay different."""
    channels = {name: getattr(shape, name, 0) for name in ("channels", "cin", "cout")}
    return {name: 32 * -(-count // 128) for name, count in channels.items() if count}


def _kind(case: Case) -> object:
    match case.shape:
        case Norm(act=act, embedding=embedding):
            return act, embedding
        case Conv(kernel=kernel):
            return kernel
        case NormConv(embedding=embedding):
            return embedding
        case Block():
            return case.shape.resample, case.network.projects(case.shape)
        case Resampling(direction=direction):
            return direction
    return None
