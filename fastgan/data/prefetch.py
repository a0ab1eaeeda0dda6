"""Batches decoded ahead by threads: iteration k's images are a function of k, so that any thread
can make them before the training asks.

Threads and not processes: decoding leaves the interpreter's lock for most of its time, an error
stays what it is, no process is forked beside CUDA, and one core already decodes several times what
a GPU consumes (docs/measured-facts.md). They make no CUDA calls, which could spoil a graph that the
training captures meanwhile.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastgan.data.dataset import ImageDataset

T = TypeVar("T")
Indices = Callable[[int], np.ndarray]
"""iteration -> int64 [k], which images make up this process's batch."""


class Ahead(Generic[T]):
    """`work(k)`, while threads already do k + 1, k + 2 ...: as many as there are `workers`.

    So at most `workers` + 1 results are held. `work` is a pure function that several threads may
    call at a time; what it raises for k is raised where k is asked for. Any k may be asked for, but
    only the next one is ready. `workers` 0: no threads. `end`: the first k that nobody asks for.
    """

    def __init__(self, work: Callable[[int], T], workers: int, end: int | None = None) -> None:
        self._work, self._workers, self._end = work, workers, end
        self._pool = ThreadPoolExecutor(workers, "decode") if workers else None
        self._pending: dict[int, Future[T]] = {}

    def __call__(self, k: int) -> T:
        if self._pool is None:
            return self._work(k)
        wanted = [j for j in range(k, k + 1 + self._workers) if self._end is None or j < self._end]
        for other in self._pending.keys() - wanted:
            self._pending.pop(other).cancel()
        for j in wanted:
            if j not in self._pending:
                self._pending[j] = self._pool.submit(self._work, j)
        return self._pending.pop(k).result()

    def close(self) -> None:
        """Ends the threads, after what they are at."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class Prefetched:
    """iteration -> its images and labels on the device, decoded by `workers` threads."""

    def __init__(
        self,
        data: ImageDataset,
        indices: Indices,
        device: torch.device,
        *,
        workers: int,
        labelled: bool,
    ) -> None:
        self._data, self._indices, self._device = data, indices, device
        self._labels = data.labels if labelled else None
        self._ahead = Ahead(self._read, workers)
        threads = "thread" if workers == 1 else "threads"
        self.description = f"decoded ahead by {workers} {threads}" if workers else "decoded in turn"

    def __call__(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        """uint8 [k, C, H, W] and labels [k] or [k, label_dim] (None where not `labelled`).

        UserError naming the entry that cannot be read.
        """
        pixels, labels = self._ahead(iteration)
        on_device = on(pixels, self._device)
        return on_device, None if labels is None else on(labels, self._device)

    def load(self) -> None:
        """Nothing to be done before the first iteration."""

    def close(self) -> None:
        """Ends the threads."""
        self._ahead.close()

    def _read(self, iteration: int) -> tuple[np.ndarray, np.ndarray | None]:
        indices = self._indices(iteration)
        labels = None if self._labels is None else self._labels[indices]
        return self._data.images(indices), labels


def on(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; a GPU fetches it while the caller goes on.

    In row-major strides: numpy may give a dimension of length 1 any stride, and by that of a single
    channel PyTorch chooses between algorithms, which round differently.
    """
    tensor = torch.from_numpy(array).view(array.shape)
    # From other than pinned memory the copy would wait. PyTorch reuses it once the GPU is done.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
