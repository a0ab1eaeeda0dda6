"""Which images make up batch k: a function of (seed, k, rank), so that nothing needs saving."""

from functools import lru_cache

import numpy as np


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
    positions = np.arange(first, first + local)
    epochs = positions // n
    indices = np.empty(local, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _permutation(n, seed, int(epoch))[positions[chosen] % n]
    return indices


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
