"""What no type can tell of a configuration, said in one line each.

A batch that does not split, a file that is not there, a number out of range: UserErrors that name
the key.
"""

import re
from dataclasses import fields, is_dataclass
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from typing import Any

from fastgan.common.errors import UserError
from fastgan.config import (
    Adam,
    DiscriminatorKind,
    Engine,
    EvaluateConfig,
    PretrainConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)

# The batch_gpu that fastgan/launch/batch_probe.py makes a number.
AUTO = "auto"
SAMPLERS = ("few_step", "heun")
_MOST_IMAGES = 10**18
# Integers beyond that are no longer exact in JSON; some keys also cost memory or time.
_LARGEST = 1 << 53
_LARGEST_OF = {
    "seed": 2**63 - 1,
    "batch": 1 << 20,
    "data.workers": 256,
    "eval.images": 10_000_000,
    "eval.batch": 1 << 20,
    "eval.sampler.steps": 10_000,
    "sampler.steps": 10_000,
    "generator.steps": 1000,
    "discriminator.width": 4096,
}


def images(value: Any, key: str, *, least: int = 0) -> int:
    """A number of images: 200k, 1.5M, 5000000 -> int; UserError naming the key otherwise."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kM]?)", str(value))
    if not match:
        raise UserError(f"{key}={value!r} is no number of images, 5000000, 200k or 5M would be")
    # Not float: 1.001 * 1e6 is not whole in binary.
    count = Fraction(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]
    if count > _MOST_IMAGES:
        raise UserError(f"{key}={value!r}, at most {_MOST_IMAGES} images would be right")
    if count.denominator != 1 or count < least:
        raise UserError(f"{key}={value!r}, a whole number of at least {least} images would be")
    return int(count)


def seed_range(text: str) -> list[int]:
    """`0-63`, `7` or `1,5,9-12` -> the list of seeds; UserError otherwise, or above 10 million."""
    seeds: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d{1,12})\s*(?:-\s*(\d{1,12})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= 10_000_000 - len(seeds):
            raise UserError(f"seeds={text!r} is no list of seeds, 0-63 or 1,5,9 would be")
        seeds.extend(range(first, last + 1))
    return seeds


def class_index(value: Any, label_dim: int) -> int | None:
    """`classes` of a sampling command: None, or one class of the network's; UserError otherwise."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < label_dim:
        raise UserError(f"classes={value!r}, a class below the network's {label_dim} expected")
    return value


def local_images(config: RunConfig, world_size: int) -> int:
    """The images of one process per iteration; UserError where the batch does not split."""
    if config.batch < 1 or config.batch % world_size:
        raise UserError(
            f"batch={config.batch} does not split over {world_size} processes, "
            f"a multiple of {world_size} would"
        )
    return config.batch // world_size


def local_batches(config: RunConfig, world_size: int) -> int:
    """The images per forward pass of one process; UserError where the batch does not split.

    As long as it is not known what auto stands for, it is all at once.
    """
    local, size = local_images(config, world_size), config.batch_gpu
    if size is None or size == AUTO:
        return local
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or local % size:
        raise UserError(
            f"batch_gpu={size!r} does not split the {local} images of one process, "
            f"one of {', '.join(map(str, divisors(local)[-6:]))} would"
        )
    return size


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def existing(path: str, key: str) -> Path:
    """The path, which must be there; UserError naming the key otherwise."""
    try:
        there = Path(path).exists()
    except OSError:  # a name that is too long
        there = False
    if not there:
        raise UserError(f"{key}={path} does not exist, an existing file or folder would")
    return Path(path)


def require_positive(config: Any, *keys: str) -> None:
    """UserError naming the first key (`a.b`) whose number is not above 0; null passes."""
    for key in keys:
        value = attrgetter(key)(config)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value} is out of range, a number above 0 would be right")


def require_finite(config: Any, prefix: str = "") -> None:
    """UserError naming the first number below `prefix` that is not finite or absurdly large."""
    for field in fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        if is_dataclass(value):
            require_finite(value, f"{key}.")
        largest = _LARGEST_OF.get(key, _LARGEST)
        if isinstance(value, int | float) and not abs(value) <= largest:
            raise UserError(f"{key}={value} is out of range, at most {largest} would be right")


def check_sampling(config: SampleConfig | EvaluateConfig) -> None:
    """UserError for what no type refuses in a command that samples, before anything is built."""
    require_finite(config)
    require_positive(config, "batch")
    _check_sampler(config, "sampler")


def check_run(config: RunConfig) -> None:
    """UserError for what no type refuses in any training, before anything is built."""
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed={config.seed} is out of range, 0 to 2^63 - 1 would be right")
    require_finite(config)
    # `1 == True` holds, so it is asked for the type.
    resident, workers = config.data.resident, config.data.workers
    if not isinstance(resident, bool) and resident != "auto":
        raise UserError(f"data.resident={resident!r}, auto, true or false would be right")
    if workers < 0:
        raise UserError(f"data.workers={workers} is out of range, 0 or more would be right")
    require_positive(config, "keep", "timeout", "eval.images", "eval.batch")
    _check_sampler(config, "eval.sampler")


def check_train(config: TrainConfig) -> None:
    """UserError for what no type refuses, before anything is built."""
    require_positive(config, "optim.lr_g", "optim.lr_d", "loss.published_batch_gpu")
    require_positive(config, "discriminator.sigma", "discriminator.width")
    _check_steps(config, "generator")
    if config.freeze.level not in range(4):
        raise UserError(f"freeze.level={config.freeze.level} is no level, 0, 1, 2 or 3 would be")
    if config.init.path is None and not isinstance(config.init.network, dict):
        raise UserError(
            "init.path is null and init.network no architecture, a network file as init.path or "
            "init.network={model_type: ..., model_channels: ...} would be right"
        )
    if config.loss.r1_interval < 0:
        raise UserError(f"loss.r1_interval={config.loss.r1_interval}, 0 (never) or more expected")
    if config.engine is Engine.fast and config.optim.adam is Adam.apex:
        raise UserError(
            "optim.adam=apex cannot be recorded by engine=fast, optim.adam=torch would be"
        )
    d = config.discriminator
    if d.kind is DiscriminatorKind.diffusion and not (config.init.path or d.network):
        raise UserError(
            "discriminator.kind=diffusion reads a pre-trained network's encoder and init.path is "
            "null, discriminator.network=FILE would name one"
        )
    check_run(config)


def check_pretrain(config: PretrainConfig) -> None:
    """UserError for what no type refuses, before anything is built."""
    check_run(config)
    images(config.optim.warmup, "optim.warmup")


def _check_sampler(config: Any, key: str) -> None:
    """UserError where `key` of the configuration (sampler, eval.sampler) is no sampler."""
    kind = attrgetter(f"{key}.kind")(config)
    if kind not in SAMPLERS:
        raise UserError(f"{key}.kind={kind}, one of {', '.join(SAMPLERS)} would be right")
    _check_steps(config, key, few=kind == "few_step")


def _check_steps(config: Any, key: str, *, few: bool = True) -> None:
    """UserError where the group `key` does not say how many steps; `few`: of a generator."""
    require_positive(config, f"{key}.steps", f"{key}.mid_sigma")
    steps, mid_sigma = attrgetter(f"{key}.steps", f"{key}.mid_sigma")(config)
    if few and mid_sigma is not None and steps != 2:
        raise UserError(f"{key}.mid_sigma is the middle of two steps, {key}.steps=2 needs it")
