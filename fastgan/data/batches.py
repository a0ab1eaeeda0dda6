"""A batch's images on the device: decoded ahead by threads, or picked out of the whole dataset.

A dataset that fits stays on the device as uint8, and an iteration only picks its rows there:
CIFAR-10 takes 0.15 GB, FFHQ 64 0.9 GB, ImageNet 64 15.7 GB, for every process a copy of its own.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastgan.common import distributed
from fastgan.common.errors import UserError
from fastgan.data.dataset import ImageDataset

T = TypeVar("T")
Indices = Callable[[int], np.ndarray]
"""iteration -> int64 [k], which images make up this process's batch."""

# The share of the device's free memory that `auto` takes, before the networks are there; and on a
# CPU, where a machine's memory is not ours alone, this much at most.
SHARE = 4
MOST_ON_CPU = 2 << 30
_BLOCK_BYTES = 16 << 20


class Ahead(Generic[T]):
    """`work(k)`, while threads already do k + 1, k + 2 ...: as many as there are `workers`.

    So at most `workers` + 1 results are held. `work` is a pure function that several threads may
    call at a time; what it raises for k is raised where k is asked for. Any k may be asked for, but
    only the next one is ready. `workers` 0: no threads.
    """

    def __init__(self, work: Callable[[int], T], workers: int) -> None:
        self._work, self._workers = work, workers
        self._pool = ThreadPoolExecutor(workers, "decode") if workers else None
        self._pending: dict[int, Future[T]] = {}

    def __call__(self, k: int) -> T:
        if self._pool is None:
            return self._work(k)
        wanted = range(k, k + 1 + self._workers)
        for other in self._pending.keys() - set(wanted):
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
    """iteration -> its images and labels on the device, decoded by `workers` threads.

    `labelled`: whether labels are wanted.
    """

    def __init__(
        self,
        data: ImageDataset,
        indices: Indices,
        device: torch.device,
        *,
        workers: int,
        labelled: bool,
    ) -> None:
        self._data, self._indices, self._device, self._workers = data, indices, device, workers
        self._labels = data.labels if labelled else None
        self._ahead = Ahead(self._read, workers)

    @property
    def description(self) -> str:
        threads = "thread" if self._workers == 1 else "threads"
        if not self._workers:
            return "decoded in turn"
        return f"decoded ahead by {self._workers} {threads}"

    def __call__(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        """uint8 [k, C, H, W] and labels [k] or [k, label_dim] (None where not `labelled`).

        UserError naming the entry that cannot be read.
        """
        pixels, labels = self._ahead(iteration)
        return on(pixels, self._device), None if labels is None else on(labels, self._device)

    def load(self) -> None:
        """Does what is to be done before the first iteration."""

    def close(self) -> None:
        """Ends the threads."""
        self._ahead.close()

    def _read(self, iteration: int) -> tuple[np.ndarray, np.ndarray | None]:
        indices = self._indices(iteration)
        labels = None if self._labels is None else self._labels[indices]
        return self._data.images(indices), labels


class Resident(Prefetched):
    """The same out of the whole dataset on the device, which the first call, or `load`, decodes."""

    @property
    def description(self) -> str:
        return f"resident on {self._device}, {decoded_bytes(self._data) / 1e9:.2f} GB"

    def __call__(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        pixels, labels = self._resident
        rows = on(self._indices(iteration), self._device)
        picked = None if labels is None else labels.index_select(0, rows)
        return pixels.index_select(0, rows), picked

    def load(self) -> None:
        _ = self._resident

    @cached_property
    def _resident(self) -> tuple[Tensor, Tensor | None]:
        labels = None if self._labels is None else on(self._labels, self._device)
        return load_pixels(self._data, self._device, self._workers), labels


def choose(data: ImageDataset, wish: bool | str, device: torch.device, processes: int) -> bool:
    """Whether the dataset shall be resident on `device`: `wish` is True, False or "auto".

    auto: where it takes at most a quarter of the free memory (CPU: of each process's part, and at
    most 2 GiB). UserError where True is wished and it does not fit at all.
    """
    if wish is False:
        return False
    needed, free = decoded_bytes(data), _free_bytes(device, processes)
    if wish is True and needed > free:
        raise UserError(
            f"data.resident=true takes {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB "
            f"free, dataset {data.name}, data.resident=auto would be right"
        )
    most = free // SHARE if device.type == "cuda" else min(free // SHARE, MOST_ON_CPU)
    return wish is True or needed <= most


def decoded_bytes(data: ImageDataset) -> int:
    """What all images, and their labels, take as they are decoded."""
    labels = 0 if data.labels is None else data.labels.nbytes
    return len(data) * data.channels * data.resolution**2 + labels


def load_pixels(data: ImageDataset, device: torch.device, workers: int) -> Tensor:
    """All images, uint8 [n, C, H, W] on `device`; the host holds a few blocks of them at a time."""
    shape = (data.channels, data.resolution, data.resolution)
    pixels = torch.empty((len(data), *shape), dtype=torch.uint8, device=device)
    size = max(1, _BLOCK_BYTES // pixels[0].numel())
    order = np.arange(len(data))

    def block(k: int) -> np.ndarray:
        return data.images(order[k * size : (k + 1) * size])

    look = {"desc": f"reading {data.name}", "unit": "img", "unit_scale": True, "leave": False}
    bar = tqdm(total=len(data), delay=1, disable=not distributed.is_main(), **look)
    with bar, closing(Ahead(block, workers)) as ahead:
        for k, part in enumerate(pixels.split(size)):
            part.copy_(torch.from_numpy(ahead(k)))
            bar.update(len(part))
    return pixels


def on(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; a GPU fetches it while the caller goes on.

    In row-major strides: numpy may give a dimension of length 1 any stride, and by that of a single
    channel PyTorch chooses between algorithms, which round differently.
    """
    tensor = torch.from_numpy(array).view(array.shape)
    # From other than pinned memory the copy would wait. PyTorch reuses it once the GPU is done.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _free_bytes(device: torch.device, processes: int) -> int:
    """A GPU's free memory, or one process's part of what is free on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
