"""Which parameters the fine-tune leaves untouched (the published rule, on the published names)."""

from torch import nn

from fastgan.models.precond import Precond

# Level 0 is D2O (all trained), level 1 D2O-F; each level adds a layer type of the residual blocks.
FREEZE_SETS: tuple[tuple[str, ...], ...] = (
    (),
    ("conv", "proj"),
    ("conv", "proj", "qkv"),
    ("conv", "proj", "qkv", "skip"),
)


def is_frozen(name: str, level: int) -> bool:
    """Whether the parameter of that published name (`model.enc...`) is frozen at `level`."""
    inside_block = any(part in name for part in ("block", "up", "down", "in"))
    return inside_block and any(part in name for part in FREEZE_SETS[level])


def freeze(network: Precond, level: int) -> list[str]:
    """Sets requires_grad by the rule; returns the names that train.

    Augmentation labels are not used in fine-tuning, so that `map_augment` does not train either.
    """
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not is_frozen(name, level) and "map_augment" not in name)
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def frozen_share(network: nn.Module, level: int) -> float:
    """Frozen share of the parameters in [0, 1], `map_augment` left out."""
    counts = {n: p.numel() for n, p in network.named_parameters() if "map_augment" not in n}
    return sum(n for name, n in counts.items() if is_frozen(name, level)) / sum(counts.values())
