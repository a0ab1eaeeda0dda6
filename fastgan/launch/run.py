"""What the training commands share, from their start to the loop's end."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fastgan import config as cfg
from fastgan.common import distributed
from fastgan.common.distributed import World
from fastgan.common.precision import strict_within
from fastgan.data import ImageDataset
from fastgan.evaluation.protocol import generator_statistics, score
from fastgan.launch import build, checks
from fastgan.launch.batch_probe import naming_batch_gpu, naming_what_fits, settle_batch_gpu
from fastgan.launch.engine import prepare_process
from fastgan.launch.run_dir import open_run_dir
from fastgan.models import Precond
from fastgan.models.sampling import save_grid
from fastgan.training.loop import Schedule, run_loop
from fastgan.training.state import TrainingStep

GRID_SEEDS = list(range(64))


def start(config: cfg.RunConfig) -> World:
    """Joins the job and prepares this process.

    UserError where the batch does not split over it, or a number of images is none.
    """
    world = distributed.init(config.device.value, config.timeout)
    prepare_process(config, world.device)
    checks.local_batches(config, world.size)
    schedule(config)
    checks.images(config.ema.half_life, "ema.half_life")
    return world


def run(
    config: cfg.RunConfig,
    world: World,
    data: ImageDataset,
    model: build.Model,
    make_step: Callable[..., TrainingStep],
    networks: list[nn.Module],
    *,
    plan: list[str],
    trained_by: str,
    full_speed: float | None = None,
) -> None:
    """Says the plan, to which `plan` adds lines; then, unless that is all, trains.

    `make_step(config, world, *networks)` is the step, or on copies a trial of batch_gpu=auto.
    `trained_by`: the command, for the network files' provenance. `full_speed`: see Monitor.
    """
    when = schedule(config)
    reals = build.batches(data, config, model.network.label_dim, world)
    if distributed.is_main():
        print(f"{config.experiment_name}: {when.total_images} images of {data.name} ({len(data)})")
        print(*plan, _describe_batch(config, world), reals.description, sep="\n", flush=True)
    if config.dry_run:
        return

    evaluate = evaluation(config, data, world)
    run_dir = open_run_dir(config)
    provenance = {} if model.source is None else model.source.provenance_of_derived()
    provenance |= {"trained_by": trained_by, "data": data.provenance()}
    explained = partial(naming_batch_gpu, config, world)
    with reals:
        settle_batch_gpu(
            config, world, model.network, lambda c, w: make_step(c, w, *map(deepcopy, networks))
        )
        with explained():
            run_loop(
                make_step(config, world, *networks),
                reals,
                when,
                run_dir,
                world,
                network_config=model.architecture,
                provenance=provenance,
                evaluate=evaluate,
                full_speed=full_speed,
                explained=explained,
            )


def schedule(config: cfg.RunConfig) -> Schedule:
    """The loop's schedule in images; UserError naming a key that is no number of images."""
    return Schedule(
        batch=config.batch,
        total_images=checks.images(config.total_images, "total_images", least=1),
        tick=checks.images(config.tick, "tick", least=1),
        snapshot=checks.images(config.snapshot, "snapshot", least=1),
        keep=config.keep,
    )


def _describe_batch(config: cfg.RunConfig, world: World) -> str:
    """`batch 256 = 4 processes x 2 rounds x 32`, or `x 64 in rounds of batch_gpu=auto`."""
    batch_gpu = checks.local_batches(config, world.size)
    rounds = f"{config.batch // world.size // batch_gpu} rounds x {batch_gpu}"
    if config.batch_gpu == checks.AUTO:
        rounds = f"{batch_gpu} in rounds of batch_gpu=auto"
    text = f"batch {config.batch} = {world.size} processes x {rounds} images"
    trains_heads = isinstance(config, cfg.TrainConfig)
    return f"{text} (also the batch of the heads' BatchNorm)" if trains_heads else text


def millions(module: nn.Module) -> str:
    """The number of a module's parameters, to be read."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def evaluation(
    config: cfg.RunConfig, data: ImageDataset, world: World
) -> Callable[[Precond, int], dict[str, float]]:
    """What happens at a snapshot: a grid of fixed seeds, and the Frechet distance if asked for.

    Loads what measures first, so that a wrong `eval` is refused before the run directory is made.
    """
    e = config.eval
    if e.extractor is not None:
        with strict_within():
            where = e.reference or data
            features, reference = build.extractor_and_reference(e, where, world.device)

    @strict_within()
    @naming_what_fits("eval.batch", e.batch, [e.batch // 2 or 1])
    def evaluate(network: Precond, nimg: int) -> dict[str, float]:
        sample = build.sample_fn(network, e.sampler, world.device)
        if world.rank == 0:
            starts = range(0, len(GRID_SEEDS), e.batch)
            grid = torch.cat([sample(GRID_SEEDS[i : i + e.batch]) for i in starts])
            save_grid(grid, Path(config.run_dir, "samples", f"{nimg:010d}.png"), columns=8, scale=2)
        if e.extractor is None:
            return {}
        generated = generator_statistics(sample, list(range(e.images)), features, e.batch)
        result = score(generated, reference, features)
        return {f"Metric/{result['metric']}": result["value"]}

    return evaluate
