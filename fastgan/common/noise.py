"""Stateless randomness: every draw is a function of (seed, purpose, iteration), never of history.

Nothing about random numbers has to be saved to resume a run, and the images of a run do not depend
on how many processes share a batch: each draws the whole batch's noise, or walks through the same
permutations of the dataset, and keeps its slice.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for (seed, key...), e.g. stream(42, "z", iteration)."""
    return reseed(torch.Generator(device), seed, *key)


def reseed(generator: torch.Generator, seed: int, *key: int | str) -> torch.Generator:
    """Makes a generator draw what `stream` of the same key draws."""
    return generator.manual_seed(_mixed(seed, key))


@contextmanager
def global_stream(seed: int, *key: int | str, device: torch.device) -> Iterator[None]:
    """Within, the global generators (CPU, `device`) draw from (seed, key...); then as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_mixed(seed, key))
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Module constructors inside draw from `seed`; the CPU's global state is as before afterwards.

    PyTorch's initialisers draw from the global CPU generator. Only that one is seeded and restored,
    so construct on the CPU: torch.manual_seed would also reset every GPU's generator.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        yield


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """N(0, 1) draws on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)


def seeded_latents(
    seeds: list[int], shape: tuple[int, int, int], label_dim: int = 0
) -> tuple[Tensor, Tensor | None]:
    """One image's z per seed, and its uniform class, as the published sampler draws them.

    Returns float64 z [n, C, H, W] and int64 classes [n] (None without classes), on the CPU: an
    image is named by its seed alone, whatever the batch around it.
    """
    z, classes = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        z.append(torch.randn(shape, generator=generator))
        if label_dim:
            classes.append(torch.randint(label_dim, (), generator=generator))
    return torch.stack(z).double(), torch.stack(classes) if label_dim else None


def batch_indices(
    n: int, *, seed: int, iteration: int, batch: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Indices int64 [batch // world_size] of this rank's images in iteration k.

    Batches walk through one permutation of the n images after another; the processes' parts of a
    batch lie side by side, so that together they are the batch one process would take.
    """
    assert batch % world_size == 0 and 0 <= rank < world_size
    local = batch // world_size
    first = iteration * batch + rank * local
    epochs, places = np.divmod(np.arange(first, first + local), n)
    indices = np.empty(local, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _permutation(n, seed, int(epoch))[places[chosen]]
    return indices


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def _mixed(seed: int, key: tuple[int | str, ...]) -> int:
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    # Philox takes 64 bits; 63 stay clear of manual_seed's signed limit.
    return int.from_bytes(digest[:8], "little") >> 1
