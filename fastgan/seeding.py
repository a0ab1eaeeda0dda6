"""Reproducible construction of modules without touching the caller's random state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Module constructors inside draw from `seed`; the CPU's global state is as before afterwards.

    PyTorch's initialisers draw from the global CPU generator. Only that one is seeded and restored,
    so construct on the CPU: torch.manual_seed would also reset every GPU's generator.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
