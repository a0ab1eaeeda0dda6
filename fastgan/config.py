"""Every key a user may set, its type and its default; and what no single key can tell.

Hydra composes configs/*.yaml against these dataclasses, so that an unknown key or a wrong type is
refused by name. `check_train` and its siblings say in one line what fits no type: a batch that does
not split, a file that is not there.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from fastgan.errors import UserError

SAMPLERS = ("few_step", "heun")
_POSITIVE = (
    "generator.steps",
    "generator.mid_sigma",
    "loss.published_batch_gpu",
    "discriminator.sigma",
    "discriminator.width",
)


class Device(Enum):
    cpu = "cpu"
    cuda = "cuda"


class Engine(Enum):
    plain = "plain"


class Kernels(Enum):
    auto = "auto"
    reference = "reference"


class Precision(Enum):
    """published: G's UNet bf16 on CUDA (float32 on the CPU), D strict float32; bf16: both bf16."""

    published = "published"
    bf16 = "bf16"


class Reduction(Enum):
    mean = "mean"
    published = "published"


class LossKind(Enum):
    nonsaturating = "nonsaturating"
    hinge = "hinge"


class NonFinite(Enum):
    skip = "skip"
    published = "published"


class DiscriminatorKind(Enum):
    """projected: heads on timm backbones; diffusion: on the diffusion UNet's own encoder."""

    projected = "projected"
    diffusion = "diffusion"


@dataclass
class DataConfig:
    path: str = MISSING
    """A dataset zip or folder in EDM's format, or digits | digits/val | digits/test."""
    max_images: int | None = None


@dataclass
class InitConfig:
    path: str | None = MISSING
    """The pre-trained network (safetensors); null trains from random weights (a control)."""
    network: Any = None
    """The architecture when path is null: {model_type: ..., model_channels: ...}."""


@dataclass
class GeneratorConfig:
    steps: int = 1
    mid_sigma: float | None = None


@dataclass
class FreezeConfig:
    level: int = 1
    """0: nothing (D2O); 1: convolutions and attention output (D2O-F); 2: + qkv; 3: + skips."""


@dataclass
class LossConfig:
    kind: LossKind = LossKind.nonsaturating
    reduction: Reduction = Reduction.mean
    r1_gamma: float = 1e-4
    """In the published convention: beside a loss summed over `published_batch_gpu` images."""
    r1_interval: int = 16
    published_batch_gpu: int = 64


@dataclass
class OptimConfig:
    lr_g: float = MISSING
    lr_d: float = MISSING
    decay_from: float | None = None
    """Share of total_images after which both learning rates fall linearly to 0 (null: never)."""


@dataclass
class EmaConfig:
    half_life: str = "500k"
    """In images."""
    ramp: float | None = 0.05


@dataclass
class DiscriminatorConfig:
    kind: DiscriminatorKind = DiscriminatorKind.projected
    backbones: list[str] = field(default_factory=list)
    weights: dict[str, str | None] = field(default_factory=dict)
    """Backbone -> local weights file; without an entry timm downloads them; "random": none."""
    class_embedding: str | None = None
    """File of tools/class_embedding.py for the conditional heads (null: random embedding)."""
    augment: list[str] = field(default_factory=list)
    """DiffAugment policies: color, translation, cutout."""
    network: str | None = None
    """Whose encoder kind diffusion reads: a network file; null: init.path's."""
    sigma: float = 0.2
    """Noise level at which the diffusion encoder is asked for features (kind diffusion)."""
    width: int = 32


@dataclass
class SamplerConfig:
    kind: str = "few_step"
    """few_step: the one-step (steps: N-step) generator; heun: EDM's sampler."""
    steps: int = 1
    mid_sigma: float | None = None


@dataclass
class EvalConfig:
    """How a checkpoint is measured: Frechet distance to a dataset or a statistics file."""

    extractor: str | None = None
    """inception | clean | timm:MODEL | resnet56 | classifier:FILE | pca:DIM; null: no number."""
    weights: str | None = None
    reference: str | None = None
    """Statistics file (.npz, mu and sigma) or dataset; null: the training data."""
    images: int = 10_000
    batch: int = 64
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass
class RunConfig:
    """What training runs of every kind share."""

    experiment_name: str = "custom"
    run_dir: str = MISSING
    seed: int = 42
    device: Device = Device.cuda
    batch: int = MISSING
    batch_gpu: Any = None
    """Images per forward pass: null (all at once), a divisor of batch / processes, or auto."""
    total_images: Any = MISSING
    """Images to train on; accepts 200k and 5M."""
    tick: Any = "10k"
    """Images between two lines of the log."""
    snapshot: Any = "250k"
    """Images between two checkpoints."""
    keep: int = 3
    """Checkpoints kept (the latest ones, and the best)."""
    dry_run: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    published: Any = None
    """What the paper reports for this experiment; null where it reports nothing."""


@dataclass
class TrainConfig(RunConfig):
    """python -m fastgan.train"""

    engine: Engine = Engine.plain
    kernels: Kernels = Kernels.auto
    precision: Precision = Precision.published
    nonfinite: NonFinite = NonFinite.skip
    share_fakes: bool = False
    init: InitConfig = field(default_factory=InitConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


@dataclass
class PretrainOptimConfig:
    lr: float = 1e-3
    beta2: float = 0.999
    warmup: str = "10M"
    """Images over which the learning rate rises linearly from 0."""
    cosine: bool = False
    """Whether the learning rate then falls to 0 as a cosine over total_images."""


@dataclass
class NoiseConfig:
    """ln sigma ~ N(mean, std^2) in training (EDM: P_mean, P_std)."""

    mean: float = -1.2
    std: float = 1.2


@dataclass
class PretrainConfig(RunConfig):
    """python -m fastgan.pretrain"""

    network: dict[str, Any] = field(default_factory=dict)
    """precond, model_type and the UNet's arguments; image shape and labels come from the data."""
    precision: Precision = Precision.published
    optim: PretrainOptimConfig = field(default_factory=PretrainOptimConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)


@dataclass
class SampleConfig:
    """python -m fastgan.sample"""

    checkpoint: str = MISSING
    """A network file, a run directory (its latest EMA) or a folder of its checkpoints."""
    out: str = MISSING
    """NAME.npz (arr_0, uint8 NHWC), NAME.png (a grid) or a folder of PNG files."""
    seeds: str = "0-63"
    classes: Any = None
    """One class for all images; null draws it from the seed."""
    batch: int = 64
    device: Device = Device.cuda
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass
class EvaluateConfig:
    """python -m fastgan.evaluate"""

    checkpoint: str | None = None
    images: str | None = None
    """Instead of a checkpoint: a folder, zip or .npz of finished images."""
    out: str = MISSING
    """The JSON file of the result."""
    extractor: str = "inception"
    weights: str | None = None
    reference: str = MISSING
    """Statistics file (.npz with mu and sigma) or a dataset."""
    save_reference: str | None = None
    """Where to write the reference's statistics in EDM's format."""
    seeds: str = "0-49999"
    batch: int = 64
    device: Device = Device.cuda
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


def images(value: Any, key: str, *, least: int = 0) -> int:
    """A number of images: 200k, 1.5M, 5000000 -> int; UserError naming the key otherwise."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kM]?)", str(value))
    if not match:
        raise UserError(f"{key}={value!r} is no number of images, 5000000, 200k or 5M would be")
    # Not float: 1.001 * 1e6 is not whole in binary.
    count = Fraction(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]
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


def local_batches(config: RunConfig, world_size: int) -> int:
    """The images per forward pass of one process; UserError where the batch does not split."""
    if config.batch < 1 or config.batch % world_size:
        raise UserError(
            f"batch={config.batch} does not split over {world_size} processes, "
            f"a multiple of {world_size} would"
        )
    local = config.batch // world_size
    size = config.batch_gpu
    if size is None:
        return local
    if size == "auto":
        raise UserError("batch_gpu=auto has no memory probe yet, a divisor of the batch or null")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or local % size:
        divisors = [d for d in range(1, local + 1) if local % d == 0][-6:]
        raise UserError(
            f"batch_gpu={size!r} does not split the {local} images of one process, "
            f"one of {', '.join(map(str, divisors))} would"
        )
    return size


def existing(path: str, key: str) -> Path:
    """The path, which must be there; UserError naming the key otherwise."""
    if not Path(path).exists():
        raise UserError(f"{key}={path} does not exist, an existing file or folder would")
    return Path(path)


def require_positive(config: Any, *keys: str) -> None:
    """UserError naming the first key (`a.b`) whose number is not above 0; null passes."""
    for key in keys:
        value = attrgetter(key)(config)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value} is out of range, a number above 0 would be right")


def check_sampler(config: Any, key: str) -> None:
    """UserError where `key` of the configuration (sampler, eval.sampler) is no sampler."""
    sampler: SamplerConfig = attrgetter(key)(config)
    if sampler.kind not in SAMPLERS:
        raise UserError(f"{key}.kind={sampler.kind}, one of {', '.join(SAMPLERS)} would be right")
    require_positive(config, f"{key}.steps", f"{key}.mid_sigma")
    if sampler.kind == "few_step" and sampler.mid_sigma is not None and sampler.steps != 2:
        raise UserError(f"{key}.mid_sigma is the middle of two steps, {key}.steps=2 needs it")


def check_run(config: RunConfig) -> None:
    """UserError for what no type refuses in any training, before anything is built."""
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed={config.seed} is out of range, 0 to 2^63 - 1 would be right")
    require_positive(config, "keep", "eval.images", "eval.batch")
    check_sampler(config, "eval.sampler")


def check_train(config: TrainConfig) -> None:
    """UserError for what no type refuses, before anything is built."""
    require_positive(config, *_POSITIVE)
    if config.freeze.level not in range(4):
        raise UserError(f"freeze.level={config.freeze.level} is no level, 0, 1, 2 or 3 would be")
    if config.generator.mid_sigma is not None and config.generator.steps != 2:
        raise UserError(
            "generator.mid_sigma is the middle of two steps, generator.steps=2 needs it"
        )
    if config.init.path is None and not isinstance(config.init.network, dict):
        raise UserError(
            "init.path is null and init.network no architecture, a network file as init.path or "
            "init.network={model_type: ..., model_channels: ...} would be right"
        )
    if config.loss.r1_interval < 0:
        raise UserError(f"loss.r1_interval={config.loss.r1_interval}, 0 (never) or more expected")
    d = config.discriminator
    if d.kind is DiscriminatorKind.diffusion and not (config.init.path or d.network):
        raise UserError(
            "discriminator.kind=diffusion reads a pre-trained network's encoder and init.path is "
            "null, discriminator.network=FILE would name one"
        )
    check_run(config)
