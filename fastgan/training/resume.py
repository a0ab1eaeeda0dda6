"""How a run stops when it is asked to, and is taken up again where it was saved last."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from fastgan.checkpoint.store import load_checkpoint, resumable
from fastgan.common.distributed import cpu_group, exchanging
from fastgan.common.errors import UserError
from fastgan.common.run_state import read_state
from fastgan.training.state import TrainingStep

# As schedulers send them before they end a job; SLURM's --signal=USR1.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Exit status of a run that was stopped and saved: try again (EX_TEMPFAIL of sysexits.h).
PREEMPTED = 75


class Preempted(Exception):
    """The run was asked to stop and has saved; commands exit with PREEMPTED."""


class StopRequest:
    """Whether any process was sent one of SIGNALS; construct it in all of them."""

    def __init__(self) -> None:
        self._received = False
        self._group = cpu_group()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals are noted instead of ending the process."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> bool:
        """The same answer in every process, all of which must ask."""
        if self._group is None:
            return self._received
        asked = torch.tensor(float(self._received))
        with exchanging():
            dist.all_reduce(asked, group=self._group)
        return bool(asked)

    def _note(self, number: int, frame: object) -> None:
        self._received = True


def how_it_ended(run_dir: Path) -> str | None:
    """A line about the process before this one, where it did not finish; None where it did."""
    try:
        before = read_state(run_dir)
    except UserError as error:
        return f"how the run ended before is not known: {error}"
    if before is None or before.status == "done":
        return None
    if before.status == "running":
        return f"the process before this one ended without a word after {before.nimg} images"
    return f"before: {before.status} at {before.nimg} images: {before.message}"


@dataclass
class Resumed:
    """How far the run was: images and iterations done; 0 of both is the start."""

    nimg: int = 0
    iteration: int = 0
    left_out: list[str] = field(default_factory=list)
    """Newer checkpoints that could not be used, and why, a line each."""


def resume(step: TrainingStep, folder: Path) -> Resumed:
    """Loads the newest checkpoint in `folder` that is whole and fits into `step`.

    UserError where there are checkpoints and none is: starting over would overwrite them.
    """
    found, last = Resumed(), None
    for path in resumable(folder):
        try:
            found.nimg, found.iteration = _restore(step, path)
            return found
        except UserError as error:
            last = error
            found.left_out.append(f"left out: {error}")
    if last is not None:
        raise last
    return found


def _restore(step: TrainingStep, path: Path) -> tuple[int, int]:
    checkpoint = load_checkpoint(path)
    own, saved = step.average.state_dict(), checkpoint.average
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise UserError(f"{path} holds another network than this run's, another run_dir would do")
    step.average.load_state_dict(saved)
    step.load_state(checkpoint.training)
    return checkpoint.nimg, checkpoint.iteration
