"""python -m fastgan.train experiment=NAME key=value ...: the GAN fine-tune."""

from copy import deepcopy
from functools import partial

import torch

from fastgan import config as cfg
from fastgan.common import distributed
from fastgan.common.distributed import World
from fastgan.launch import build, checks
from fastgan.launch.batch_probe import naming_batch_gpu, settle_batch_gpu
from fastgan.launch.cli import hydra_command
from fastgan.launch.engine import make_step, prepare_process, step_settings
from fastgan.launch.run import describe_batch, evaluation, provenance, say, schedule
from fastgan.launch.run_dir import open_run_dir
from fastgan.models import Precond
from fastgan.models.freeze import frozen_share
from fastgan.performance.machines import full_speed
from fastgan.training.loop import run_loop
from fastgan.training.step import PlainStep


def train(config: cfg.TrainConfig) -> None:
    """Fine-tunes the network of `init.path` against a discriminator, into a run directory."""
    checks.check_train(config)
    world = distributed.init(config.device.value, config.timeout)
    prepare_process(config, world.device)
    settings, plan = step_settings(config, world), schedule(config)
    data = build.dataset(config.data)
    model = build.generator(config, data)
    network = model.network
    discriminator = build.discriminator(config, network, data)
    build.prepare_generator(config, network)
    reals = build.batches(data, config, network.label_dim, world)
    say(
        [
            f"{config.experiment_name}: {plan.total_images} images of {data.name} ({len(data)})",
            f"generator: {_millions(network)} M parameters, {_frozen(network, config)} frozen",
            f"discriminator: {_millions(discriminator.heads)} M trained parameters",
            describe_batch(config, world, settings.batch_gpu)
            + " images (also the batch of the heads' BatchNorm)",
            reals.description,
        ]
    )
    if config.dry_run:
        return

    evaluate = evaluation(config, data, world)
    run_dir = open_run_dir(config)

    def rehearsed(config: cfg.TrainConfig, world: World) -> PlainStep:
        copies = deepcopy(network), deepcopy(discriminator)
        return make_step(config, step_settings(config, world), *copies, world)

    with reals:
        settle_batch_gpu(config, world, network, rehearsed)
        settings = step_settings(config, world)
        explained = partial(naming_batch_gpu, config, world)
        with explained():
            run_loop(
                make_step(config, settings, network, discriminator, world),
                reals,
                plan,
                run_dir,
                world,
                network_config=model.architecture,
                provenance=provenance(model, data, "fastgan.train"),
                evaluate=evaluate,
                full_speed=full_speed(config, model.architecture, world),
                explained=explained,
            )


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}"


def _frozen(network: Precond, config: cfg.TrainConfig) -> str:
    return f"{100 * frozen_share(network, config.freeze.level):.2f}%"


if __name__ == "__main__":
    hydra_command("train", cfg.TrainConfig, train)
