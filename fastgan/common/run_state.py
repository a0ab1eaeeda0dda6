"""state.json: what a scheduler, a script or the next start asks a run for."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from fastgan.common.errors import UserError
from fastgan.common.files import parse_object, read_bounded, replace_atomically

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
        content = parse_object(read_bounded(path, _MOST_BYTES))
        if content.keys() != RunState.__annotations__.keys():
            raise ValueError("other keys")
        state = RunState(**content)
        code = state.exit_code  # below zero: the signal that ended the process
        right = {
            "status": state.status in get_args(Status),
            "nimg": type(state.nimg) is int and 0 <= state.nimg < 2**63,
            "exit_code": code is None or (type(code) is int and -256 < code < 256),
            "message": type(state.message) is str,
        }
        if not all(right.values()):
            raise ValueError(f"impossible {', '.join(k for k, fits in right.items() if not fits)}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"damaged ({error}), {path}, one line with status, nimg, exit_code and message expected"
        ) from error
    return state
