"""The training loop: counts images, reports, saves, evaluates. The mathematics is in the step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgan.checkpoint.store import Checkpoint, save_checkpoint
from fastgan.distributed import World, all_reduce_sum, barrier
from fastgan.errors import UserError
from fastgan.models import Precond
from fastgan.training.monitor import Averages, Monitor
from fastgan.training.resume import resume
from fastgan.training.state import StepResult
from fastgan.training.stop import PREEMPTED, Preempted, StopRequest

# After this many iterations in a row with a non-finite gradient the run has diverged.
MAX_SKIPPED = 10
# Exit status of a diverged run.
DIVERGED = 3


class Diverged(Exception):
    """Too many iterations in a row had non-finite gradients; commands exit with DIVERGED."""


class Step(Protocol):
    """One iteration of any kind of training."""

    average: Precond

    def run(self, reals: Tensor, labels: Tensor | None, iteration: int) -> StepResult: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Schedule:
    """When the loop does what, in images."""

    batch: int
    total_images: int
    tick: int
    snapshot: int
    keep: int

    def due(self, every: int, nimg: int) -> bool:
        """Whether the batch that ended at `nimg` crossed a multiple of `every`, or was the last."""
        return nimg // every > (nimg - self.batch) // every or nimg >= self.total_images


def run_loop(
    step: Step,
    draw: Callable[[int], tuple[Tensor, Tensor | None]],
    schedule: Schedule,
    run_dir: Path,
    world: World,
    *,
    network_config: dict[str, Any],
    provenance: dict[str, Any],
    evaluate: Callable[[Precond, int], dict[str, float]],
    full_speed: float | None = None,
) -> None:
    """Trains from the latest checkpoint in `run_dir` (or from the start) to `total_images`.

    `draw(iteration)` gives this process's reals [local, C, H, W] and one-hot labels; `evaluate`
    is called on all processes with the averaged network at every snapshot and returns its metrics.
    `full_speed`: see Monitor.
    state.json says how it went; raises Diverged after MAX_SKIPPED iterations in a row without an
    update, and Preempted once SIGTERM or SIGUSR1 came and everything is saved.
    """
    checkpoints = run_dir / "checkpoints"
    resumed = resume(step, checkpoints)
    nimg, iteration = resumed.nimg, resumed.iteration
    main = world.rank == 0
    monitor = Monitor(
        run_dir,
        total_images=schedule.total_images,
        nimg=nimg,
        device=world.device,
        main=main,
        full_speed=full_speed,
    )
    averages, skipped_in_a_row, begun = Averages(), 0, nimg
    stop = StopRequest()

    def save(metrics: dict[str, float]) -> None:
        if main:
            state = Checkpoint(
                network_config,
                {n: t.detach().cpu() for n, t in step.average.state_dict().items()},
                {n: t.detach().cpu() for n, t in step.state().items()},
                nimg,
                iteration,
                metrics,
                provenance,
            )
            save_checkpoint(checkpoints, state, keep=schedule.keep)
        barrier()

    with _outcome(monitor), stop.listening():
        for line in resumed.left_out:
            monitor.log(line)
        if nimg:
            done = ", nothing left to do" if nimg >= schedule.total_images else ""
            monitor.log(f"{nimg} images are trained in {run_dir}{done}")
        while nimg < schedule.total_images:
            # One iteration.
            reals, labels = draw(iteration)
            result = step.run(reals, labels, iteration)
            averages.add(result.scalars)
            nimg, iteration = nimg + schedule.batch, iteration + 1
            monitor.advance(schedule.batch)
            if nimg == begun + schedule.batch:
                monitor.first_iteration()

            # Divergence: gradients are averaged before they are checked, so that all ranks agree.
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            if result.skipped:
                monitor.log(f"iteration {iteration - 1}: skipped {result.skipped}, not finite")
            if skipped_in_a_row >= MAX_SKIPPED:
                raise Diverged(
                    f"gradients not finite in {MAX_SKIPPED} iterations in a row, at {nimg} images"
                )

            # Report.
            if schedule.due(schedule.tick, nimg):
                monitor.tick(_mean_over_processes(averages.take(), world))
                monitor.state("running", None)

            # Snapshot: measure, then save. Asked to stop: only save.
            if schedule.due(schedule.snapshot, nimg):
                with monitor.clock_stopped():
                    metrics = evaluate(step.average, nimg)
                    monitor.metrics(metrics)
                    save(metrics)
            if nimg < schedule.total_images and stop.agreed():
                if not schedule.due(schedule.snapshot, nimg):
                    save({})
                raise Preempted(f"asked to stop, saved at {nimg} images, the same command resumes")


@contextmanager
def _outcome(monitor: Monitor) -> Iterator[None]:
    """state.json: running within, then done, preempted, diverged or failed, and why."""
    monitor.state("running", None)
    try:
        yield
    except Preempted as error:
        monitor.state("preempted", PREEMPTED, str(error))
        raise
    except Diverged as error:
        monitor.state("diverged", DIVERGED, str(error))
        raise
    except BaseException as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        monitor.state("failed", 1, kind + str(error))
        raise
    finally:
        monitor.close()
    monitor.state("done", 0)


def _mean_over_processes(means: dict[str, float], world: World) -> dict[str, float]:
    if world.size == 1:
        return means
    values = torch.tensor(list(means.values()), dtype=torch.float64)
    return dict(zip(means, (all_reduce_sum(values) / world.size).tolist(), strict=True))
