"""A dataset that fits stays on the device as uint8, and an iteration only picks its rows there.

CIFAR-10 takes 0.15 GB, FFHQ 64 0.9 GB, ImageNet 64 15.7 GB. Every process holds a copy of its own.
"""

import os
from contextlib import closing

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastgan import distributed
from fastgan.data.dataset import ImageDataset
from fastgan.data.prefetch import Ahead, Indices, on
from fastgan.errors import UserError

# The share of the device's free memory that `auto` takes, before the networks are there; and on a
# CPU, where a machine's memory is not ours alone, this much at most.
SHARE = 4
MOST_ON_CPU = 2 << 30
_BLOCK_BYTES = 16 << 20


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


class Resident:
    """iteration -> its images and labels out of the whole dataset on the device."""

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
        self._resident: tuple[Tensor, Tensor | None] | None = None
        self.description = f"resident on {device}, {decoded_bytes(data) / 1e9:.2f} GB"

    def __call__(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        """uint8 [k, C, H, W] and labels [k] or [k, label_dim] (None where not `labelled`)."""
        pixels, labels = self.load()
        rows = on(self._indices(iteration), self._device)
        picked = None if labels is None else labels.index_select(0, rows)
        return pixels.index_select(0, rows), picked

    def load(self) -> tuple[Tensor, Tensor | None]:
        """All images and labels, decoded once, by `workers` threads; UserError naming a broken
        entry."""
        if self._resident is None:
            labels = None if self._labels is None else on(self._labels, self._device)
            self._resident = load_pixels(self._data, self._device, self._workers), labels
        return self._resident

    def close(self) -> None:
        """Nothing runs beside the training."""


def load_pixels(data: ImageDataset, device: torch.device, workers: int) -> Tensor:
    """All images, uint8 [n, C, H, W] on `device`; the host holds a few blocks of them at a time."""
    shape = (data.channels, data.resolution, data.resolution)
    pixels = torch.empty((len(data), *shape), dtype=torch.uint8, device=device)
    size = max(1, _BLOCK_BYTES // pixels[0].numel())
    starts = range(0, len(data), size)

    def block(k: int) -> np.ndarray:
        return data.images(np.arange(starts[k], min(starts[k] + size, len(data))))

    bar = tqdm(
        total=len(data),
        desc=f"reading {data.name}",
        unit="img",
        unit_scale=True,
        leave=False,
        delay=1,
        disable=not distributed.is_main(),
    )
    with bar, closing(Ahead(block, workers, end=len(starts))) as ahead:
        for k, start in enumerate(starts):
            images = torch.from_numpy(ahead(k))
            pixels[start : start + len(images)].copy_(images)
            bar.update(len(images))
    return pixels


def _free_bytes(device: torch.device, processes: int) -> int:
    """A GPU's free memory, or one process's part of what is free on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
