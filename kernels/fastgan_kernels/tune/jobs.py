"""What `python -m fastgan_kernels.tune` measures, in which order: convolutions behind a norm."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastgan_kernels.aot.shapes import Network
from fastgan_kernels.norm_silu_conv.plans import DIRECTIONS, Direction, Shape
from fastgan_kernels.norm_silu_conv.table import Key

# Of a residual block's sum.
GAIN = 0.5**0.5


@dataclass(frozen=True)
class Case:
    """One direction of a block's 3 x 3 convolution with the norm in front.

    embedding: what the norm takes of it, by name: nothing in front of a block's first convolution;
    the second one adds the residual and has the gain. dtype: bf16, fp16 or fp32.
    """

    shape: Shape
    dtype: str
    direction: Direction
    batch: int
    embedding: str

    @property
    def groups(self) -> int:
        return min(32, self.shape.cin // 4)

    @property
    def gain(self) -> float:
        return GAIN if self.embedding else 1.0

    @property
    def flop(self) -> int:
        s = self.shape
        return 2 * self.batch * s.pixels * s.cin * s.cout * s.kernel**2


@dataclass(frozen=True)
class Job:
    """What becomes an entry of the table: `embeddings` has a case of the shape for each.

    share: of a network's multiplications in convolutions, the largest where several have the shape.
    """

    shape: Shape
    dtype: str
    direction: Direction
    batch: int
    embeddings: tuple[str, ...]
    network: str
    share: float

    def __str__(self) -> str:
        s = self.shape
        return f"{s.cin} to {s.cout} {s.height}x{s.width} {self.dtype} {self.direction}"

    @property
    def key(self) -> Key:
        return self.shape, self.dtype, self.direction

    @property
    def cases(self) -> list[Case]:
        return [Case(*self.key, self.batch, embedding) for embedding in self.embeddings]


def jobs(networks: Iterable[Network], dtypes: Sequence[str]) -> list[Job]:
    """In the networks' order; a shape that several have once, with the largest batch of theirs.

    A block's first convolution is not behind its norm where it resamples in between.
    """
    found: dict[Shape, Job] = {}
    for network in networks:
        total = sum(i * o * s**2 * k**2 * n for (i, o, s, k), n in network.convolutions().items())
        shares: dict[Shape, float] = {}
        for block in network.blocks:
            first = Shape(block.cin, block.cout, block.out_size, block.out_size, 3)
            second = replace(first, cin=block.cout)
            uses = [(second, network.embedding)]
            for shape, embedding in uses if block.resample else [(first, ""), *uses]:
                work = 9 * shape.cin * shape.cout * shape.pixels * block.count / total
                shares[shape] = shares.get(shape, 0.0) + work
                known = found.get(shape)
                new = Job(shape, "", "forward", network.batch, (embedding,), network.name, 0.0)
                found[shape] = new if known is None else _joined(known, new)
        for shape, share in shares.items():
            found[shape] = replace(found[shape], share=max(found[shape].share, share))
    return [
        replace(job, dtype=dtype, direction=direction)
        for dtype in dtypes
        for job in found.values()
        for direction in DIRECTIONS
    ]


def _joined(a: Job, b: Job) -> Job:
    embeddings = tuple(dict.fromkeys(a.embeddings + b.embeddings))
    return replace(a, embeddings=embeddings, batch=max(a.batch, b.batch))


def queue(work: Sequence[Job], known: Iterable[Key]) -> list[Job]:
    """What the table lacks first, then by share, largest first."""
    measured = set(known)
    return sorted(work, key=lambda job: (job.key in measured, -job.share))
