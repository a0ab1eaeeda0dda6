"""Taking up a run where it was saved last, or before that where the last checkpoint is no good."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan.checkpoint.store import load_checkpoint, resumable
from fastgan.common.distributed import cpu_group, exchanging
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically
from fastgan.models import Precond


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


STATE = "state.json"
Status = Literal["running", "done", "failed", "diverged", "preempted"]
# Ours is one line; a longer file is not ours.
_MOST_BYTES = 64 * 1024


@dataclass(frozen=True)
class RunState:
    """How far a run is, in images, and how its last process ended; None while it runs."""

    status: Status
    nimg: int
    exit_code: int | None
    message: str


def write_state(run_dir: Path, state: RunState) -> None:
    """Replaces the run's state.json atomically."""
    with replace_atomically(run_dir / STATE) as file:
        file.write((json.dumps(asdict(state)) + "\n").encode())


def read_state(run_dir: Path) -> RunState | None:
    """What `write_state` left, None before the first start; UserError where it is damaged."""
    path = run_dir / STATE
    if not path.exists():
        return None
    try:
        if not path.is_file():  # a pipe would keep us waiting
            raise ValueError("no file")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        return _checked(json.loads(content))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"damaged ({error}), {path}, one line with status, nimg, exit_code and message expected"
        ) from error


def _checked(content: object) -> RunState:
    if not isinstance(content, dict) or content.keys() != RunState.__annotations__.keys():
        raise ValueError("other keys")
    state = RunState(**content)
    if state.status not in get_args(Status):
        raise ValueError("unknown status")
    if type(state.nimg) is not int or not 0 <= state.nimg < 2**63:
        raise ValueError("nimg is no number of images")
    if type(state.message) is not str:
        raise ValueError("message is no text")
    if state.exit_code is not None and not _is_exit_code(state.exit_code):
        raise ValueError("exit_code is none of a process")
    return state


def _is_exit_code(value: object) -> bool:
    """Below zero: the signal that ended the process."""
    return type(value) is int and -256 < value < 256
