"""Every key a user may set, its type and its default.

Hydra composes configs/*.yaml against these dataclasses, so that an unknown key or a wrong type is
refused by name; what a type cannot tell is in checks.py.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Device(Enum):
    cpu = "cpu"
    cuda = "cuda"


class Engine(Enum):
    """How the step runs: plain is the specification, the others give its numbers faster.

    compiled: through torch.compile; fast: compiled on this project's kernels, as CUDA graphs.
    """

    plain = "plain"
    compiled = "compiled"
    fast = "fast"


class Kernels(Enum):
    auto = "auto"
    triton = "triton"
    library = "library"
    reference = "reference"


class Precision(Enum):
    """published: G's UNet bf16 on CUDA (float32 on the CPU), D strict float32; bf16: both bf16."""

    published = "published"
    bf16 = "bf16"


class Arithmetic(Enum):
    """fp32 is strict float32; tf32 float32 on tensor cores, of 10 bits; fp16 scales its losses."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"


class CompileMode(Enum):
    """torch.compile's modes that do not reuse their outputs' memory."""

    default = "default"
    autotune = "max-autotune-no-cudagraphs"


class Reduction(Enum):
    mean = "mean"
    published = "published"


class LossKind(Enum):
    nonsaturating = "nonsaturating"
    hinge = "hinge"


class NonFinite(Enum):
    skip = "skip"
    published = "published"


class Adam(Enum):
    torch = "torch"
    apex = "apex"


class DiscriminatorKind(Enum):
    """projected: heads on timm backbones; diffusion: on the diffusion UNet's own encoder."""

    projected = "projected"
    diffusion = "diffusion"


@dataclass
class CompileConfig:
    """How engine=compiled and engine=fast compile."""

    mode: CompileMode = CompileMode.default
    """max-autotune-no-cudagraphs (named autotune) tries several kernels for every convolution."""
    cache: str | None = None
    """Folder of compiled graphs and kernels, kept between runs; null: ~/.cache/fastgan."""


@dataclass
class FastConfig:
    """What engine=fast does beyond engine=compiled, besides our kernels."""

    graphs: bool = True
    """Replays iterations as CUDA graphs (GPU only)."""
    fold: bool = True
    """Folds the frozen backbones' BatchNorm into their convolutions."""


@dataclass
class ArithmeticConfig:
    """What convolutions and matrix products compute in, part by part; null: as `precision` says."""

    generator: Arithmetic | None = None
    backbones: Arithmetic | None = None
    """The discriminator's frozen features: backbones and random mixing, or the encoder."""
    heads: Arithmetic | None = None
    """The trained heads; their parameters, BatchNorm's statistics and the logits are float32."""


@dataclass
class DataConfig:
    path: str = MISSING
    """A dataset zip or folder in EDM's format, or digits | digits/val | digits/test."""
    max_images: int | None = None
    resident: Any = "auto"
    """Whether the decoded images stay in the device's memory: true, false, or auto (if small)."""
    workers: int = 4
    """Threads that decode, ahead of the training where it is not resident; 0: none."""


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
    checkpoint: bool = False
    """Whether backward computes every residual block again: less memory, one more forward of G."""


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
    adam: Adam = Adam.torch
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
    kernels: Kernels = Kernels.auto
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
    timeout: float = 600
    """Seconds that a process waits for the others before it gives them up."""
    dry_run: bool = False
    precision: Precision = Precision.published
    data: DataConfig = field(default_factory=DataConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    published: Any = None
    """What the paper reports for this experiment; null where it reports nothing."""


@dataclass
class TrainConfig(RunConfig):
    """python -m fastgan.train"""

    engine: Engine = Engine.plain
    compile: CompileConfig = field(default_factory=CompileConfig)
    fast: FastConfig = field(default_factory=FastConfig)
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    nonfinite: NonFinite = NonFinite.skip
    share_fakes: bool = False
    init: InitConfig = field(default_factory=InitConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
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
    optim: PretrainOptimConfig = field(default_factory=PretrainOptimConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)


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
    kernels: Kernels = Kernels.auto
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
    kernels: Kernels = Kernels.auto
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
