"""What a diverged run leaves behind, so that one can see why."""

import json
from pathlib import Path

from fastgan.checkpoint.store import Checkpoint, save_checkpoint
from fastgan.files import replace_atomically

FOLDER = "diverged"


def dump(
    run_dir: Path, state: Checkpoint, means: dict[str, float], blamed: dict[str, list[str]]
) -> Path:
    """Writes `diverged/`: the state as a checkpoint of its own, and why.json; returns the folder.

    Iterations depend on the state and their number alone, so that the next one, on this state,
    fails again. `means` are the last tick's; `blamed` names the parameters, by network, whose
    gradients were not finite.
    """
    folder = run_dir / FOLDER
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
