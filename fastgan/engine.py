"""Which step trains: the configuration's `engine` and `precision` made effective."""

import torch

from fastgan import checks
from fastgan import config as cfg
from fastgan.compile_cache import prepare_compiler
from fastgan.discriminator.base import Discriminator
from fastgan.distributed import World
from fastgan.kernel_choice import select_kernels
from fastgan.models import Precond
from fastgan.precision import strict_float32, tuned_convolutions
from fastgan.training.compiled import CompiledStep
from fastgan.training.ema import averaged_copy
from fastgan.training.fast import FastStep
from fastgan.training.step import PlainStep, StepSettings


def prepare_process(config: cfg.TrainConfig, device: torch.device) -> None:
    """Arithmetic, kernels, compile caches of this process; UserError where they cannot be had."""
    strict_float32()
    tuned_convolutions()
    compiled = config.engine is cfg.Engine.compiled
    select_kernels(config.kernels.value, device, compiled=compiled)
    if config.engine is not cfg.Engine.plain:
        prepare_compiler(config.compile.cache, device)


def make_step(
    config: cfg.TrainConfig,
    settings: StepSettings,
    network: Precond,
    discriminator: Discriminator,
    world: World,
) -> PlainStep:
    """The step of `engine` on this process's device; call it once what trains is thawed.

    Moves both networks there and sets the precision that they compute in.
    """
    network.train().to(world.device)
    discriminator.train().to(world.device)
    # Before the network is told to compute in bfloat16: evaluation is in float32, as published.
    average = averaged_copy(network)
    if config.precision is cfg.Precision.bf16 or world.device.type == "cuda":
        network.compute_dtype = torch.bfloat16
    parts = (network, average, discriminator, settings, world)
    if config.engine is cfg.Engine.compiled:
        return CompiledStep(*parts, mode=config.compile.mode.value)
    if config.engine is cfg.Engine.fast:
        fast = config.fast
        mode = config.compile.mode.value
        return FastStep(*parts, mode=mode, graphs=fast.graphs, fold=fast.fold)
    return PlainStep(*parts)


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
        discriminator_bf16=config.precision is cfg.Precision.bf16,
    )
