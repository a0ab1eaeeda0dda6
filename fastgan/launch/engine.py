"""What this process computes with: arithmetic, kernels, compile caches, and which step trains."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from fastgan_kernels import dispatch

from fastgan import config as cfg
from fastgan.common.distributed import World
from fastgan.common.errors import UserError
from fastgan.common.precision import strict_float32, tensor_float32, tuned_convolutions
from fastgan.discriminator.base import Discriminator
from fastgan.launch import checks
from fastgan.models import Precond
from fastgan.training.compiled import CompiledStep
from fastgan.training.edm_step import EdmSettings, EdmStep, warmup_then_cosine
from fastgan.training.fast import FastStep
from fastgan.training.step import PlainStep, StepSettings
from fastgan.training.updater import averaged_copy

# auto of engine=compiled: Inductor fuses the definitions itself; attention it leaves to a library.
FOR_COMPILER = "reference,attention=library"
# Variables that name cache folders, and what ours are called.
FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
_DTYPES = {cfg.Arithmetic.bf16: torch.bfloat16, cfg.Arithmetic.fp16: torch.float16}


def prepare_process(
    config: cfg.RunConfig | cfg.SampleConfig | cfg.EvaluateConfig, device: torch.device
) -> None:
    """Arithmetic, kernels, compile caches of this process; UserError where they cannot be had."""
    tf32, engine = False, cfg.Engine.plain
    if isinstance(config, cfg.TrainConfig):
        tf32, engine = arithmetic(config, device).tf32, config.engine
        if engine is not cfg.Engine.plain:
            prepare_compiler(config.compile.cache, device)
    (tensor_float32 if tf32 else strict_float32)()
    if isinstance(config, cfg.RunConfig):
        tuned_convolutions()
    select_kernels(config.kernels.value, device, compiled=engine is cfg.Engine.compiled)


def select_kernels(setting: str, device: torch.device, *, compiled: bool = False) -> None:
    """Sets the implementation of every op for this process; FASTGAN_KERNELS overrides it.

    `compiled`: auto then means what torch.compile makes most of, the plain definitions. UserError
    where either names no implementation, or one that cannot run on `device`.
    """
    try:
        dispatch.use(FOR_COMPILER if compiled and setting == "auto" else setting)
        for op in dispatch.IMPLEMENTATIONS:
            dispatch.choose(op, device.type, torch.float32)
    except ValueError as error:
        raise UserError(str(error)) from error


def prepare_compiler(cache: str | None, device: torch.device) -> Path:
    """Sets the cache folders of this process (variables that are set already win); their parent.

    `cache` None is $XDG_CACHE_HOME/fastgan. Graphs are found there by their contents and by the
    versions of what compiled them: a run on another GPU or torch compiles its own. UserError where
    the folder cannot be written, or where the CPU has no C++ compiler.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(cache) if cache else Path(base) / "fastgan"
    for variable, name in FOLDERS.items():
        folder = Path(os.environ.setdefault(variable, str(root / name)))
        try:
            # What lies there is loaded and run: nobody else may write it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the compile cache cannot be written ({error.strerror}), {folder}, "
                "compile.cache=FOLDER would name another"
            ) from error
    compilers = (os.environ.get("CXX", "g++"), "c++", "g++", "clang++")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(
            "no C++ compiler, on PATH, engine=compiled or fast on the CPU needs g++ or clang++, "
            "engine=plain does not"
        )
    return root


@dataclass(frozen=True)
class Parts:
    """What each part of an iteration computes in; None: float32, its parameters' dtype."""

    generator: torch.dtype | None
    backbones: torch.dtype | None
    heads: torch.dtype | None
    tf32: bool
    """Whether what is float32 is multiplied on tensor cores."""

    @property
    def fp16(self) -> bool:
        """Whether gradients pass where small ones vanish."""
        return torch.float16 in (self.generator, self.backbones, self.heads)


def arithmetic(config: cfg.TrainConfig, device: torch.device) -> Parts:
    """`precision`, and what `arithmetic` says otherwise; UserError where that cannot be."""
    bf16, fp32 = cfg.Arithmetic.bf16, cfg.Arithmetic.fp32
    both = config.precision is cfg.Precision.bf16
    preset = {
        "generator": bf16 if both or device.type == "cuda" else fp32,
        "backbones": bf16 if both else fp32,
        "heads": bf16 if both else fp32,
    }
    chosen = {name: getattr(config.arithmetic, name) or preset[name] for name in preset}
    if cfg.Arithmetic.fp16 in chosen.values() and config.nonfinite is cfg.NonFinite.published:
        raise UserError(
            "nonfinite=published replaces what fp16 must see to scale its losses, in arithmetic, "
            "nonfinite=skip or bf16 would be right"
        )
    tf32 = cfg.Arithmetic.tf32 in chosen.values()
    strict = [name for name, value in chosen.items() if value is fp32]
    if tf32 and strict:
        raise UserError(
            f"arithmetic.{strict[0]}=fp32 beside tf32, which a process has everywhere or nowhere, "
            f"arithmetic.{strict[0]}=tf32 or bf16 would be right"
        )
    return Parts(tf32=tf32, **{name: _DTYPES.get(value) for name, value in chosen.items()})


def make_step(
    config: cfg.TrainConfig, world: World, network: Precond, discriminator: Discriminator
) -> PlainStep:
    """The step of `engine` on this process's device; call it once what trains is thawed.

    Moves both networks there and sets the precision that they compute in.
    """
    network.train().to(world.device)
    discriminator.train().to(world.device)
    # Before the network is told what to compute in: evaluation is in float32, as published.
    average = averaged_copy(network)
    parts = arithmetic(config, world.device)
    network.compute_dtype = parts.generator
    discriminator.compute_in(parts.backbones, parts.heads)
    objects = (network, average, discriminator, step_settings(config, world), world)
    mode, fast = config.compile.mode.value, config.fast
    if config.engine is cfg.Engine.compiled:
        return CompiledStep(*objects, mode=mode)
    if config.engine is cfg.Engine.fast:
        return FastStep(*objects, mode=mode, graphs=fast.graphs, fold=fast.fold)
    return PlainStep(*objects)


def step_settings(config: cfg.TrainConfig, world: World) -> StepSettings:
    """The step's settings out of the configuration's groups."""
    return StepSettings(
        seed=config.seed,
        batch=config.batch,
        batch_gpu=checks.local_batches(config, world.size),
        total_images=checks.images(config.total_images, "total_images"),
        lr_g=config.optim.lr_g,
        lr_d=config.optim.lr_d,
        adam=config.optim.adam.value,
        decay_from=config.optim.decay_from,
        loss=config.loss.kind.value,
        reduction=config.loss.reduction.value,
        r1_gamma=config.loss.r1_gamma,
        r1_interval=config.loss.r1_interval,
        published_batch_gpu=config.loss.published_batch_gpu,
        ema_half_life=checks.images(config.ema.half_life, "ema.half_life"),
        ema_ramp=config.ema.ramp,
        share_fakes=config.share_fakes,
        nonfinite=config.nonfinite.value,
        steps=config.generator.steps,
        mid_sigma=config.generator.mid_sigma,
        scale_losses=arithmetic(config, world.device).fp16,
    )


def make_edm_step(config: cfg.PretrainConfig, world: World, network: Precond) -> EdmStep:
    """Pre-training's step on this process's device, to which it moves the network."""
    network.to(world.device)
    average = averaged_copy(network)
    if config.precision is cfg.Precision.bf16:
        network.compute_dtype = torch.bfloat16
    total = checks.images(config.total_images, "total_images")
    warmup = checks.images(config.optim.warmup, "optim.warmup")
    settings = EdmSettings(
        seed=config.seed,
        batch=config.batch,
        batch_gpu=checks.local_batches(config, world.size),
        lr=config.optim.lr,
        beta2=config.optim.beta2,
        lr_factor=warmup_then_cosine(warmup, total, cosine=config.optim.cosine),
        noise_mean=config.noise.mean,
        noise_std=config.noise.std,
        ema_half_life=checks.images(config.ema.half_life, "ema.half_life"),
        ema_ramp=config.ema.ramp,
    )
    return EdmStep(network, average, settings, world)
