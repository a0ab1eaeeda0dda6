"""python -m fastgan.pretrain experiment=NAME key=value ...: an EDM model from random weights."""

from copy import deepcopy
from functools import partial

import torch

from fastgan import config as cfg
from fastgan.common import distributed
from fastgan.common.distributed import World
from fastgan.common.precision import strict_float32, tuned_convolutions
from fastgan.launch import build, checks
from fastgan.launch.batch_probe import naming_batch_gpu, settle_batch_gpu
from fastgan.launch.cli import hydra_command
from fastgan.launch.engine import select_kernels
from fastgan.launch.run import describe_batch, evaluation, provenance, say, schedule
from fastgan.launch.run_dir import open_run_dir
from fastgan.models import Precond
from fastgan.training.edm_step import EdmSettings, EdmStep, warmup_then_cosine
from fastgan.training.loop import run_loop
from fastgan.training.updater import averaged_copy


def pretrain(config: cfg.PretrainConfig) -> None:
    """Trains a denoiser with EDM's loss, into a run directory."""
    checks.check_run(config)
    world = distributed.init(config.device.value, config.timeout)
    strict_float32()
    tuned_convolutions()
    select_kernels(config.kernels.value, world.device)
    settings, plan = edm_settings(config, world), schedule(config)
    data = build.dataset(config.data)
    model = build.fresh_network(config, data)
    network = model.network
    reals = build.batches(data, config, network.label_dim, world)
    say(
        [
            f"{config.experiment_name}: {plan.total_images} images of {data.name} ({len(data)})",
            f"network: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters",
            describe_batch(config, world, settings.batch_gpu),
            reals.description,
        ]
    )
    if config.dry_run:
        return

    evaluate = evaluation(config, data, world)
    run_dir = open_run_dir(config)

    def rehearsed(config: cfg.PretrainConfig, world: World) -> EdmStep:
        return make_edm_step(config, deepcopy(network), world)

    with reals:
        settle_batch_gpu(config, world, network, rehearsed)
        explained = partial(naming_batch_gpu, config, world)
        with explained():
            run_loop(
                make_edm_step(config, network, world),
                reals,
                plan,
                run_dir,
                world,
                network_config=model.architecture,
                provenance=provenance(model, data, "fastgan.pretrain"),
                evaluate=evaluate,
                explained=explained,
            )


def make_edm_step(config: cfg.PretrainConfig, network: Precond, world: World) -> EdmStep:
    """The step on this process's device, to which it moves the network."""
    network.to(world.device)
    average = averaged_copy(network)
    if config.precision is cfg.Precision.bf16:
        network.compute_dtype = torch.bfloat16
    return EdmStep(network, average, edm_settings(config, world), world)


def edm_settings(config: cfg.PretrainConfig, world: World) -> EdmSettings:
    """The step's settings out of the configuration's groups."""
    total = checks.images(config.total_images, "total_images")
    warmup = checks.images(config.optim.warmup, "optim.warmup")
    return EdmSettings(
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


if __name__ == "__main__":
    hydra_command("pretrain", cfg.PretrainConfig, pretrain)
