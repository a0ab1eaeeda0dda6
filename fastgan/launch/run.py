"""What the training commands share: the plan in words, the schedule, measuring at snapshots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgan import config as cfg
from fastgan.common import distributed
from fastgan.common.distributed import World
from fastgan.common.precision import strict_within
from fastgan.data import ImageDataset
from fastgan.evaluation.grid import save_grid
from fastgan.evaluation.protocol import generator_statistics, score
from fastgan.launch import build, checks
from fastgan.launch.batch_probe import naming_what_fits
from fastgan.models import Precond
from fastgan.training.loop import Schedule

GRID_SEEDS = list(range(64))


def schedule(config: cfg.RunConfig) -> Schedule:
    """The loop's schedule in images; UserError naming a key that is no number of images."""
    return Schedule(
        batch=config.batch,
        total_images=checks.images(config.total_images, "total_images", least=1),
        tick=checks.images(config.tick, "tick", least=1),
        snapshot=checks.images(config.snapshot, "snapshot", least=1),
        keep=config.keep,
    )


def describe_batch(config: cfg.RunConfig, world: World, batch_gpu: int) -> str:
    """`batch 256 = 4 processes x 2 rounds x 32`, or `x 64 in rounds of batch_gpu=auto`."""
    if config.batch_gpu == checks.AUTO:
        whole = f"batch {config.batch} = {world.size} processes x {batch_gpu}"
        return f"{whole} in rounds of batch_gpu=auto"
    accumulation = config.batch // world.size // batch_gpu
    return f"batch {config.batch} = {world.size} processes x {accumulation} rounds x {batch_gpu}"


def say(lines: list[str]) -> None:
    """Prints a run's plan, on the first process."""
    if distributed.is_main():
        print("\n".join(lines), flush=True)


def provenance(model: build.Model, data: ImageDataset, command: str) -> dict[str, Any]:
    """Where the weights of this run's network files come from."""
    base = {} if model.source is None else model.source.provenance_of_derived()
    return {**base, "trained_by": command, "data": data.provenance()}


def evaluation(
    config: cfg.RunConfig, data: ImageDataset, world: World
) -> Callable[[Precond, int], dict[str, float]]:
    """What happens at a snapshot: a grid of fixed seeds, and the Frechet distance if asked for.

    Loads what measures first, so that a wrong `eval` is refused before the run directory is made.
    """
    e = config.eval
    if e.extractor is not None:
        with strict_within():
            features, reference = build.extractor_and_reference(
                e.extractor, e.weights, e.reference or data, world.device, e.batch
            )

    @strict_within()
    @naming_what_fits("eval.batch", e.batch, [e.batch // 2 or 1])
    def evaluate(network: Precond, nimg: int) -> dict[str, float]:
        sample = build.sample_fn(network, e.sampler, world.device)
        if world.rank == 0:
            grid = torch.cat([sample(GRID_SEEDS[i : i + e.batch]) for i in _starts(e.batch)])
            save_grid(grid, Path(config.run_dir, "samples", f"{nimg:010d}.png"), columns=8, scale=2)
        if e.extractor is None:
            return {}
        generated = generator_statistics(sample, list(range(e.images)), features, e.batch)
        result = score(generated, reference, features)
        return {f"Metric/{result['metric']}": result["value"]}

    return evaluate


def _starts(batch: int) -> range:
    return range(0, len(GRID_SEEDS), batch)
