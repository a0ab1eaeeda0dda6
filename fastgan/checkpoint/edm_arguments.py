"""The architecture in the constructor arguments of a published checkpoint.

They come out of a stranger's file: every value is held to a type and a range before a network is
built with it.
"""

import math
from typing import Any, TypeGuard

from fastgan.checkpoint.edm_records import as_plain, module_content
from fastgan.errors import UserError, shown

# The order in which the published preconditioning classes take them.
_POSITIONS = (
    "img_resolution",
    "img_channels",
    "label_dim",
    "use_fp16",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "model_type",
)
# Precision is the trainer's, and fine-tuning uses neither kind of dropout.
_DROPPED = ("use_fp16", "dropout", "label_dropout")
_INTEGERS = {
    "img_resolution": (1, 4096),
    "img_channels": (1, 64),
    "label_dim": (0, 1_000_000),
    "augment_dim": (0, 1024),
    "model_channels": (1, 4096),
    "channel_mult_emb": (1, 64),
    "channel_mult_noise": (1, 64),
    "num_blocks": (1, 64),
}
_LISTS = {"channel_mult": (1, 64), "attn_resolutions": (1, 4096), "resample_filter": (1, 1000)}
_MAX_ITEMS = 16
_MAX_ARGUMENTS = 64
_MAX_SIGMA = 1e6
_SIGMAS = ("sigma_min", "sigma_max", "sigma_data")
_TEXTS = ("model_type", "embedding_type", "encoder_type", "decoder_type")
_KNOWN = {*_INTEGERS, *_LISTS, *_SIGMAS, *_TEXTS}


def architecture(
    precond: str, content: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config for `network_from_config`, and the simple arguments that have no place in it.

    Args:
        precond: EDMPrecond or D2OPrecond.
        content: the `__dict__` of the preconditioning object, as the file records it.
        where: names the file in errors.

    Raises UserError for a known argument of the wrong type or size, and for an unknown one that is
    not a number, a text or a short list of them.
    """
    unet_class, _ = module_content(content["_modules"]["model"])
    positional = zip(_POSITIONS, content.get("_init_args", ()), strict=False)
    arguments = dict(positional) | content.get("_init_kwargs", {})
    if len(arguments) > _MAX_ARGUMENTS:
        raise UserError(
            f"{len(arguments)} constructor arguments, {where}, at most {_MAX_ARGUMENTS} expected"
        )
    config: dict[str, Any] = {"precond": precond, "model_type": unet_class}
    unused: dict[str, Any] = {}
    for name, value in arguments.items():
        value = as_plain(value)
        if name in _DROPPED or (name == "sigma_max" and value == math.inf):
            continue
        right = what_is_right(name, value)
        if right is not None:
            raise UserError(f"constructor argument {shown(name)}={shown(value)}, {where}, {right}")
        target = config if name in _KNOWN else unused
        target[name] = list(value) if isinstance(value, tuple) else value
    return config, unused


def what_is_right(name: str, value: object) -> str | None:
    """What a constructor argument of a network should be, or None where it is that."""
    if name in _INTEGERS:
        low, high = _INTEGERS[name]
        return None if _is_whole(value, low, high) else f"an integer of {low} to {high} expected"
    if name in _LISTS:
        low, high = _LISTS[name]
        fits = _is_list(value) and all(_is_whole(v, low, high) for v in value)
        return None if fits else f"a short list of integers of {low} to {high} expected"
    if name in _SIGMAS:
        fits = isinstance(value, int | float) and 0 <= value < _MAX_SIGMA
        fits = fits or (name == "sigma_max" and value == math.inf)
        return None if fits else f"a number from 0 to {_MAX_SIGMA} expected"
    if name in _TEXTS:
        return None if _is_simple(value) and isinstance(value, str) else "a short text expected"
    fits = _is_simple(value) or (_is_list(value) and all(map(_is_simple, value)))
    return None if fits else "an argument of the published networks expected"


def _is_whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_list(value: object) -> TypeGuard[list[object] | tuple[object, ...]]:
    return isinstance(value, list | tuple) and len(value) <= _MAX_ITEMS


def _is_simple(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= 100
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) < 1 << 62
    return value is None
