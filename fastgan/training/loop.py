"""The training loop: counts images, reports, saves, evaluates. The mathematics is in the step."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan.checkpoint.store import Checkpoint, CheckpointWriter, save_checkpoint
from fastgan.common.distributed import World, all_reduce_sum, barrier, same_everywhere
from fastgan.common.errors import UserError, one_line
from fastgan.common.files import replace_atomically, sweep
from fastgan.models import Precond
from fastgan.training.monitor import (
    DIVERGED,
    MAX_SKIPPED,
    Averages,
    Diverged,
    Health,
    Monitor,
    Skips,
)
from fastgan.training.resume import PREEMPTED, Preempted, StopRequest, how_it_ended, resume
from fastgan.training.state import TrainingStep


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
    step: TrainingStep,
    draw: Callable[[int], tuple[Tensor, Tensor | None]],
    schedule: Schedule,
    run_dir: Path,
    world: World,
    *,
    network_config: dict[str, Any],
    provenance: dict[str, Any],
    evaluate: Callable[[Precond, int], dict[str, float]],
    full_speed: float | None = None,
    explained: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Trains from the latest checkpoint in `run_dir` (or from the start) to `total_images`.

    `draw(iteration)` gives this process's reals [local, C, H, W] and one-hot labels; `evaluate`
    is called on all processes with the averaged network at every snapshot and returns its metrics.
    `full_speed`: see Monitor. Within `explained()` errors may become others, which say more.
    state.json says how it went; raises Diverged at the tick after MAX_SKIPPED iterations in a row
    without an update, and Preempted once SIGTERM or SIGUSR1 came and everything is saved.
    """
    checkpoints = run_dir / "checkpoints"
    resumed = resume(step, checkpoints)
    nimg, iteration = resumed.nimg, resumed.iteration
    main = world.rank == 0
    before = how_it_ended(run_dir) if main else None
    if main:
        sweep(run_dir)
        sweep(run_dir / "samples")
    monitor = Monitor(
        run_dir,
        total_images=schedule.total_images,
        nimg=nimg,
        device=world.device,
        main=main,
        full_speed=full_speed,
    )
    averages, skips, health, begun = Averages(), Skips(world.device), Health(), nimg
    stop = StopRequest()
    writer = CheckpointWriter(checkpoints, keep=schedule.keep, main=main)

    def state(metrics: dict[str, float]) -> Checkpoint:
        average, training = step.average.state_dict(), step.state()
        return Checkpoint(network_config, average, training, nimg, iteration, metrics, provenance)

    def tick() -> None:
        means = _mean_over_processes(averages.take(), world)
        left_out = skips.take()
        monitor.tick(means | {"Progress/skipped": sum(left_out.values())})
        monitor.state("running", None)
        for name, count in left_out.items():
            monitor.log(f"left out {count} updates of {name}: loss or gradients not finite")
        for line in health.warnings(means):
            monitor.log(line)
        # All processes agree: what is checked are means over them.
        if skips.longest() >= MAX_SKIPPED:
            if main:
                _dump(run_dir, state({}), means, step.blamed())
            raise Diverged(
                f"loss or gradients not finite in {skips.longest()} iterations in a row, "
                f"at {nimg} images, {run_dir / 'diverged'} holds the state and names them"
            )
        if not same_everywhere(step.checksum()):
            raise UserError(
                f"processes hold different parameters, at {nimg} images, a GPU or a connection "
                "between them may compute wrong; an earlier checkpoint may be right"
            )
        writer.check()

    with _outcome(monitor), explained(), stop.listening(), writer:
        for line in (*([before] if before else []), *resumed.left_out):
            monitor.log(line)
        if nimg:
            done = ", nothing left to do" if nimg >= schedule.total_images else ""
            monitor.log(f"{nimg} images are trained in {run_dir}{done}")
        while nimg < schedule.total_images:
            # One iteration.
            reals, labels = draw(iteration)
            result = step.run(reals, labels, iteration)
            averages.add(result.scalars)
            skips.add(result.skipped)
            nimg, iteration = nimg + schedule.batch, iteration + 1
            monitor.advance(schedule.batch)
            if nimg == begun + schedule.batch:
                monitor.first_iteration()

            # Report.
            if schedule.due(schedule.tick, nimg):
                tick()

            # Snapshot: measure, then save. Asked to stop: only save.
            if schedule.due(schedule.snapshot, nimg):
                with monitor.clock_stopped():
                    metrics = evaluate(step.average, nimg)
                    monitor.metrics(metrics)
                    writer.save(state(metrics))
            if nimg < schedule.total_images and stop.agreed():
                if not schedule.due(schedule.snapshot, nimg):
                    writer.save(state({}))
                writer.finish()
                barrier()
                raise Preempted(f"asked to stop, saved at {nimg} images, the same command resumes")
        writer.finish()
        barrier()


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
        monitor.state("failed", 1, _said(error))
        raise
    finally:
        monitor.close()
    monitor.state("done", 0)


def _said(error: BaseException) -> str:
    """An error in one line, with its type where it is no user's mistake."""
    if isinstance(error, UserError):
        return str(error)
    return one_line(": ".join(filter(None, (type(error).__name__, str(error)))))


def _mean_over_processes(means: dict[str, float], world: World) -> dict[str, float]:
    if world.size == 1:
        return means
    values = torch.tensor(list(means.values()), dtype=torch.float64)
    return dict(zip(means, (all_reduce_sum(values) / world.size).tolist(), strict=True))


def _dump(
    run_dir: Path, state: Checkpoint, means: dict[str, float], blamed: dict[str, list[str]]
) -> Path:
    """Writes `diverged/`: the state as a checkpoint of its own, and why.json; returns the folder.

    Iterations depend on the state and their number alone, so that the next one, on this state,
    fails again. `means` are the last tick's; `blamed` names the parameters, by network, whose
    gradients were not finite.
    """
    folder = run_dir / "diverged"
    save_checkpoint(folder, state, keep=1)
    why = {
        "nimg": state.nimg,
        "iteration": state.iteration,
        "not_finite": blamed,
        "means": {name: repr(value) for name, value in means.items()},
    }
    with replace_atomically(folder / "why.json") as file:
        file.write((json.dumps(why, indent=2) + "\n").encode())
    return folder
