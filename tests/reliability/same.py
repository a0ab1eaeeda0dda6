"""Whether two checkpoints are the same, bit for bit."""

from pathlib import Path

import torch
from torch import Tensor

from fastgan.checkpoint.store import load_checkpoint


def differences(a: Path, b: Path) -> list[str]:
    """What of two checkpoints (folders) is not the same, bit for bit: tensors and facts by name.

    Not compared is where the weights come from. UserError: one is missing or damaged.
    """
    one, other = load_checkpoint(a), load_checkpoint(b)
    facts = ("network_config", "nimg", "iteration", "metrics")
    found = [name for name in facts if getattr(one, name) != getattr(other, name)]
    for kind in ("average", "training"):
        first, second = getattr(one, kind), getattr(other, kind)
        for name in sorted(first.keys() | second.keys()):
            if name not in first or name not in second or not _same(first[name], second[name]):
                found.append(f"{kind}/{name}")
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Of bits, so that NaN equals itself and 0.0 does not equal -0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
