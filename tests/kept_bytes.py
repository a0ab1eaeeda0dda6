"""Bytes of activations that autograd keeps for the backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(function: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """Of the whole storages that a call keeps, without those of `given`; runs its backward too."""
    known = {t.untyped_storage().data_ptr() for t in given}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = function()
    total = sum(kept.values())
    y.sum().backward()
    return total
