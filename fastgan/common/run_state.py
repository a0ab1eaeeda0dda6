"""state.json: what a scheduler, a script or the next start asks a run for."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically

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
