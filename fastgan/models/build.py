"""From a checkpoint's architecture record to a network."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from fastgan.common.errors import UserError
from fastgan.models.precond import D2O_EPS, Precond
from fastgan.models.unets import DhariwalUNet, SongUNet

_UNETS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {
    "SongUNet": SongUNet,
    "DhariwalUNet": DhariwalUNet,
}
_EPS = {"EDMPrecond": 0.0, "D2OPrecond": D2O_EPS}
_PRECOND_KEYS = ("sigma_min", "sigma_max", "sigma_data")
# Constructor arguments of the original that change nothing here: precision is the trainer's.
_IGNORED = ("use_fp16", "label_dropout")


def network_from_config(config: Mapping[str, Any]) -> Precond:
    """Builds the network that `config` describes, on the current default device.

    `config` is flat: `precond` (EDMPrecond | D2OPrecond), `img_resolution`, `img_channels`,
    `label_dim`, `model_type` (SongUNet | DhariwalUNet), then that UNet's arguments (absent ones
    take the published class defaults, dropout 0). Raises UserError naming a bad key or value.
    """
    arguments = {k: v for k, v in config.items() if k not in _IGNORED}
    eps = _choose(arguments, "precond", _EPS)
    unet = _choose(arguments, "model_type", _UNETS)
    label_dim = arguments.setdefault("label_dim", 0)
    channels = arguments.pop("img_channels", None)
    resolution = arguments.get("img_resolution")
    levels = len(arguments.get("channel_mult", (1,) * 4))
    if not isinstance(channels, int) or not isinstance(resolution, int):
        raise UserError("network config has no img_resolution and img_channels, integers expected")
    if resolution < 1 or resolution % 2 ** (levels - 1):
        raise UserError(
            f"img_resolution {resolution} in the network config does not halve {levels - 1} times, "
            f"a multiple of {2 ** (levels - 1)} would"
        )
    precond = {k: arguments.pop(k) for k in _PRECOND_KEYS if k in arguments}
    parameters = inspect.signature(unet).parameters
    if unknown := sorted(set(arguments) - set(parameters)):
        raise UserError(f"unknown keys {unknown} in the network config, not arguments of {unet}")
    for key, value in arguments.items():
        kind = parameters[key].annotation
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise UserError(_wrong(key, value, get_args(kind)))
    model = unet(in_channels=channels, out_channels=channels, **arguments)
    return Precond(model, label_dim=label_dim, eps=eps, **precond)


def _choose(arguments: dict[str, Any], key: str, table: Mapping[str, Any]) -> Any:
    value = arguments.pop(key, None)
    if value not in table:
        raise UserError(_wrong(key, value, tuple(table)))
    return table[value]


def _wrong(key: str, value: object, allowed: tuple[str, ...]) -> str:
    return f"{key}={value!r} in the network config, one of {', '.join(allowed)} expected"


_NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "model_channels": 128,
    "augment_dim": 9,
    "img_channels": 3,
}
_CIFAR10 = {**_NCSNPP, "img_resolution": 32, "channel_mult": [2, 2, 2]}
_FACES64 = {**_NCSNPP, "img_resolution": 64, "channel_mult": [1, 2, 2, 2], "label_dim": 0}

PUBLISHED_NETWORKS: dict[str, dict[str, Any]] = {
    "cifar10_uncond": {**_CIFAR10, "label_dim": 0},
    "cifar10_cond": {**_CIFAR10, "label_dim": 10},
    "ffhq64": _FACES64,
    "afhqv2_64": _FACES64,
    "imagenet64": {
        "model_type": "DhariwalUNet",
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "img_channels": 3,
        "img_resolution": 64,
        "label_dim": 1000,
    },
}
"""Arguments of `network_from_config` without `precond` (ImageNet's is ADM)."""
