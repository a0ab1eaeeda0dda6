"""Taking up a run where it was saved last, or before that where the last checkpoint is no good."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fastgan.checkpoint.store import load_checkpoint, resumable
from fastgan.errors import UserError
from fastgan.models import Precond
from fastgan.run_state import read_state


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


class Restorable(Protocol):
    """What of a training step comes back."""

    average: Precond

    def load_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class Resumed:
    """How far the run was: images and iterations done; 0 of both is the start."""

    nimg: int = 0
    iteration: int = 0
    left_out: list[str] = field(default_factory=list)
    """Newer checkpoints that could not be used, and why, a line each."""


def resume(step: Restorable, folder: Path) -> Resumed:
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


def _restore(step: Restorable, path: Path) -> tuple[int, int]:
    checkpoint = load_checkpoint(path)
    own, saved = step.average.state_dict(), checkpoint.average
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise UserError(f"{path} holds another network than this run's, another run_dir would do")
    step.average.load_state_dict(saved)
    step.load_state(checkpoint.training)
    return checkpoint.nimg, checkpoint.iteration
