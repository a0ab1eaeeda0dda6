"""python -m tests.reliability.kills [SCENARIO]: kills training at every call that changes files.

Prints a table of the calls and what became of the runs; with SCENARIO that one's findings as JSON.
The process that it runs in trains nothing itself: every training is a forked child, from a warm
start.
"""

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgan.checkpoint.store import load_checkpoint
from fastgan.common.errors import UserError
from fastgan.common.run_state import read_state
from fastgan.training.loop import Schedule, run_loop
from fastgan.training.monitor import Diverged
from fastgan.training.resume import resume
from tests.conftest import TINY
from tests.reliability.ptrace import Call, Kill, Traced, in_child, run_traced, tree
from tests.reliability.soak import differences
from tests.training.toys import ALONE, gan_step, reals

SAVE = 4  # images between checkpoints, of which two are kept and the first, the best one
DIVERGES = 12  # where it does, and is noticed at a tick ten iterations later
NOTICED = DIVERGES + 10 * SAVE


def train(run_dir: Path, total: int) -> None:
    """Iterations of SAVE images up to `total`, taken up where the run was."""
    _loop(run_dir, total, lambda k: (reals(k), None))


def diverge(run_dir: Path) -> None:
    """Goes on to an end with a dump: from DIVERGES on the data are not finite."""
    nan = torch.full_like(reals(0), torch.nan)
    try:
        _loop(run_dir, 1000, lambda k: (nan if SAVE * k >= DIVERGES else reals(k), None), NOTICED)
    except Diverged:
        return
    raise AssertionError("did not diverge")


def _loop(run_dir: Path, total: int, draw: Callable[[int], Any], every: int = SAVE) -> None:
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        run_loop(
            gan_step(),
            draw,
            Schedule(SAVE, total, tick=every, snapshot=every, keep=2),
            run_dir,
            ALONE,
            network_config=dict(TINY),
            provenance={"license": "test"},
            evaluate=lambda network, nimg: {"FD": 1.0 if nimg == SAVE else 2.0},
        )


@dataclass(frozen=True)
class Scenario:
    """What is killed: `disturbed`, in a run directory that `prepare` made; `proceed` follows."""

    prepare: Callable[[Path], None]
    disturbed: Callable[[Path], None]
    proceed: Callable[[Path], None]
    ends_with: str
    """The checkpoint that must hold the undisturbed run's bits in the end."""


def go_back(run_dir: Path) -> None:
    """A user takes a longer run up again from an older checkpoint."""
    train(run_dir, 16)
    (run_dir / "checkpoints/latest").write_text("0000000012")


LAST = "checkpoints/0000000020"
SCENARIOS = {
    "first checkpoint": Scenario(
        lambda run: None, lambda run: train(run, 4), lambda run: train(run, 20), LAST
    ),
    "next checkpoint": Scenario(
        lambda run: train(run, 12), lambda run: train(run, 16), lambda run: train(run, 20), LAST
    ),
    "over an old one": Scenario(
        go_back, lambda run: train(run, 16), lambda run: train(run, 20), LAST
    ),
    "dump": Scenario(
        lambda run: train(run, 12),
        diverge,
        diverge,
        f"diverged/{NOTICED:010d}",
    ),
}


@dataclass
class Point:
    """What a kill at one call left."""

    call: str
    torn: bool
    where: dict[str, int]
    """The files when it died."""
    status: int
    state: str | None
    """What state.json says."""
    resumed: int
    """Images at which the run resumes."""
    whole: list[int]
    """Checkpoints that can be loaded."""
    equal: bool = False
    """Whether the run that went on ended with the undisturbed one's bits."""
    left: list[str] = field(default_factory=list)
    """All there is at the end."""


@dataclass
class Findings:
    calls: list[Call]
    trees: list[dict[str, int]]
    unlisted: list[int]
    end: list[str]
    """The files of the undisturbed run at its end."""
    points: list[Point]


def find(scenario: Scenario, folder: Path) -> Findings:
    """Enumerates the calls, then kills at each, and in the middle of each write."""
    # Names of one length: state.json holds the path.
    before, whole, killed = (folder / name for name in ("before", "intact", "killed"))
    before.mkdir()
    in_child(lambda: scenario.prepare(before))
    shutil.copytree(before, whole)
    traced = run_traced(lambda: scenario.disturbed(whole), whole)
    assert traced.status == 0
    in_child(lambda: scenario.proceed(whole))
    kills = [Kill(at) for at in range(len(traced.calls))]
    kills += [Kill(at, torn=True) for at, call in enumerate(traced.calls) if "write" in call.name]
    points = [_kill(scenario, kill, before, whole, killed) for kill in kills]
    return Findings(traced.calls, traced.trees, traced.unlisted, sorted(tree(whole)), points)


def _kill(scenario: Scenario, kill: Kill, before: Path, whole: Path, run_dir: Path) -> Point:
    shutil.copytree(before, run_dir)
    traced: Traced = run_traced(lambda: scenario.disturbed(run_dir), run_dir, kill)
    checkpoints = run_dir / "checkpoints"
    point = Point(
        str(traced.calls[-1]),
        kill.torn,
        tree(run_dir),
        traced.status,
        state.status if (state := read_state(run_dir)) else None,
        resume(gan_step(), checkpoints).nimg,
        [int(path.name) for path in sorted(checkpoints.glob("[0-9]*")) if _loads(path)],
    )
    in_child(lambda: scenario.proceed(run_dir))
    folders = [path / scenario.ends_with for path in (run_dir, whole)]
    point.equal = not differences(*folders) and _beside(folders[0]) == _beside(folders[1])
    point.left = sorted(tree(run_dir))
    shutil.rmtree(run_dir)
    return point


def _loads(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except UserError:
        return False
    return True


def _beside(checkpoint: Path) -> dict[str, str]:
    """`latest` and, of a dump, why.json."""
    return {p.name: p.read_text() for p in checkpoint.parent.iterdir() if p.is_file()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            print(json.dumps(asdict(find(SCENARIOS[sys.argv[1]], Path(folder)))))
            return
        print("| killed | calls | of them | torn writes | resumed, equal to the undisturbed run |")
        print("|---|---|---|---|---|")
        for name, scenario in SCENARIOS.items():
            (place := Path(folder, name)).mkdir()
            found = find(scenario, place)
            kinds = Counter(call.name for call in found.calls)
            torn = sum(point.torn for point in found.points)
            equal = sum(point.equal for point in found.points)
            each = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            points = f"{equal} of {len(found.points)}"
            print(f"| {name} | {len(found.calls)} | {each} | {torn} | {points} |", flush=True)


if __name__ == "__main__":
    main()
