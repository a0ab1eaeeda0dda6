"""Gradient accumulation: a process's batch in rounds of `batch_gpu` images."""

from collections.abc import Iterator

from torch import Tensor


def rounds(n: int, size: int) -> Iterator[slice]:
    """Slices that cover n images, `size` at a time."""
    assert n % size == 0
    return (slice(start, start + size) for start in range(0, n, size))


def take(labels: Tensor | None, part: slice) -> Tensor | None:
    """The labels of one round, if there are labels."""
    return None if labels is None else labels[part]
