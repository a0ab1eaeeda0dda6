"""Killed with SIGKILL at every system call that changes a run's files, nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import pytest
import torch

from fastgan.checkpoint.store import load_checkpoint
from fastgan.common.errors import UserError
from fastgan.common.run_state import read_state
from fastgan.training.loop import Schedule, run_loop
from fastgan.training.monitor import Diverged
from fastgan.training.resume import resume
from tests.conftest import TINY
from tests.processes import ROOT
from tests.reliability.ptrace import Kill, in_child, run_traced, tree
from tests.reliability.same import differences
from tests.training.toys import ALONE, gan_step, reals

SAVE = 4  # images between checkpoints, of which two are kept and the first, the best one
DIVERGES = 12  # where it does, and is noticed at a tick ten iterations later
NOTICED = DIVERGES + 10 * SAVE
_WORKER = "from tests.reliability.test_killed_saves import worker; worker()"
OPENS, WRITES = {"open", "openat", "creat"}, {"write", "pwrite64", "writev", "pwritev"}
SIZES = {"ftruncate", "truncate", "fallocate"}
SYNCS, RENAMES = {"fsync", "fdatasync"}, {"rename", "renameat", "renameat2"}
pytestmark = pytest.mark.timeout(900)  # all kills of a scenario take minutes
# Whose sizes depend on the time that things took.
REPORTS = ("log.txt", "stats.jsonl")


def train(run_dir: Path, total: int, diverges: int = 1 << 30, every: int = SAVE) -> None:
    """Iterations of SAVE images, taken up where the run was; the data of some are not finite."""
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    nan = torch.full_like(reals(0), torch.nan)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        run_loop(
            gan_step(),
            lambda k: (nan if SAVE * k >= diverges else reals(k), None),
            Schedule(SAVE, total, tick=every, snapshot=every, keep=2),
            run_dir,
            ALONE,
            network_config=dict(TINY),
            provenance={"license": "test"},
            evaluate=lambda network, nimg: {"FD": 1.0 if nimg == SAVE else 2.0},
        )


def diverge(run_dir: Path) -> None:
    """Goes on to an end with a dump."""
    with pytest.raises(Diverged):
        train(run_dir, 1000, DIVERGES, NOTICED)


def go_back(run_dir: Path) -> None:
    """A user takes a longer run up again from an older checkpoint."""
    train(run_dir, 16)
    (run_dir / "checkpoints/latest").write_text("0000000012")


TO_12, TO_16, TO_20 = (partial(train, total=total) for total in (12, 16, 20))


@dataclass(frozen=True)
class Scenario:
    """What is killed: `disturbed`, in a run directory that `prepare` made; `proceed` follows.

    `saved` is what it saves; before that counts and from then on, a run resumes from `resumed` and
    `whole` can be loaded. `ends_with` must hold the undisturbed run's bits in the end.
    """

    prepare: Callable[[Path], None]
    disturbed: Callable[[Path], None]
    saved: str
    resumed: tuple[int, int]
    whole: tuple[set[int], set[int]]
    proceed: Callable[[Path], None] = TO_20
    ends_with: str = "checkpoints/0000000020"


AT_16, DUMP = "checkpoints/0000000016", f"diverged/{NOTICED:010d}"
KEPT = {4, 8, 12}
SCENARIOS = {
    "first checkpoint": Scenario(
        lambda run: None, partial(train, total=4), "checkpoints/0000000004", (0, 4), (set(), {4})
    ),
    "next checkpoint": Scenario(TO_12, TO_16, AT_16, (12, 16), (KEPT, {4, 12, 16})),
    "over an old one": Scenario(go_back, TO_16, AT_16, (12, 16), ({4, 12}, {4, 12, 16})),
    "dump": Scenario(TO_12, diverge, DUMP, (12, 12), (KEPT, KEPT), diverge, DUMP),
}


@dataclass
class Found:
    """The calls, and what a kill at each of them, and in the middle of each write, left."""

    name: str
    calls: list[tuple[str, list[str]]]
    trees: list[dict[str, int]]
    """The files as each call begins."""
    unlisted: list[int]
    end: list[str]
    """The files of the undisturbed run at its end."""
    points: list[dict[str, Any]]

    @property
    def scenario(self) -> Scenario:
        return SCENARIOS[self.name]

    @property
    def counts(self) -> int:
        """The call that makes the new checkpoint count: `latest` is renamed into place.

        Of the first one it is its folder: without `latest` the newest counts.
        """
        saved = self.scenario.saved
        name = saved if self.name == "first checkpoint" else f"{PurePath(saved).parent}/latest"
        (at,) = [i for i, call in enumerate(self.calls) if renames_to(call, name)]
        return at


def renames_to(call: tuple[str, list[str]], path: str) -> bool:
    return call[0] in RENAMES and call[1][1] == path


def worker() -> None:
    """Prints what is found. This process trains nothing: every training is a forked child."""
    name, every = sys.argv[1], int(sys.argv[2])
    scenario = SCENARIOS[name]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # Names of one length: state.json holds the path.
        before, whole, killed = (Path(folder, name) for name in ("before", "intact", "killed"))
        before.mkdir()
        in_child(lambda: scenario.prepare(before))
        shutil.copytree(before, whole)
        traced = run_traced(lambda: scenario.disturbed(whole), whole)
        assert traced.status == 0
        in_child(lambda: scenario.proceed(whole))
        kills = [Kill(at) for at in range(len(traced.calls))]
        kills += [Kill(at, torn=True) for at, c in enumerate(traced.calls) if c.name in WRITES]
        points = [killed_at(scenario, kill, before, whole, killed) for kill in kills[::every]]
        end = sorted(tree(whole))
    calls = [(call.name, call.paths) for call in traced.calls]
    print(json.dumps([name, calls, traced.trees, traced.unlisted, end, points]))


def killed_at(
    scenario: Scenario, kill: Kill, before: Path, whole: Path, run_dir: Path
) -> dict[str, Any]:
    shutil.copytree(before, run_dir)
    traced = run_traced(lambda: scenario.disturbed(run_dir), run_dir, kill)
    checkpoints, state = run_dir / "checkpoints", read_state(run_dir)
    point = {
        "at": kill.at,
        "torn": kill.torn,
        "call": str(traced.calls[-1]),
        "where": tree(run_dir),
        "status": traced.status,
        "state": state and state.status,
        "resumed": resume(gan_step(), checkpoints).nimg,
        "whole": [int(path.name) for path in checkpoints.glob("[0-9]*") if loads(path)],
    }
    in_child(lambda: scenario.proceed(run_dir))
    ours, theirs = run_dir / scenario.ends_with, whole / scenario.ends_with
    same = not differences(ours, theirs) and beside(ours) == beside(theirs)
    point |= {"equal": same, "left": sorted(tree(run_dir))}
    shutil.rmtree(run_dir)
    return point


def loads(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except UserError:
        return False
    return True


def beside(checkpoint: Path) -> dict[str, str]:
    """`latest` and, of a dump, why.json."""
    return {p.name: p.read_text() for p in checkpoint.parent.iterdir() if p.is_file()}


FEW = pytest.param(("next checkpoint", 16), id="next checkpoint, some kills")
ALL = [pytest.param((name, 1), id=name, marks=pytest.mark.slow) for name in SCENARIOS]


@pytest.fixture(scope="module", params=[FEW, *ALL])
def found(request: pytest.FixtureRequest) -> Found:
    name, every = request.param
    ended = subprocess.run(
        [sys.executable, "-c", _WORKER, name, str(every)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert ended.returncode == 0, ended.stderr
    return Found(*json.loads(ended.stdout))


def test_killed_at_every_call_there_is(found: Found) -> None:
    calls = [f"{name} {' -> '.join(paths)}" for name, paths in found.calls]
    writes = [at for at, (name, _) in enumerate(found.calls) if name in WRITES]
    every = [(at, False) for at in range(len(calls))] + [(at, True) for at in writes]
    points = [(point["at"], point["torn"]) for point in found.points]
    assert points in (every, every[::16]) and len(calls) > 50 and len(writes) > 5
    for point in found.points:
        assert point["call"] == calls[point["at"]] and point["status"] == -signal.SIGKILL


def test_no_other_call_changes_the_files(found: Found) -> None:
    assert found.unlisted == []


def test_the_call_did_not_happen(found: Found) -> None:
    """The files are those that it found."""
    for point in (point for point in found.points if not point["torn"]):
        there, expected = (
            {name: size for name, size in files.items() if name not in REPORTS}
            for files in (point["where"], found.trees[point["at"]])
        )
        assert there == expected, point["call"]


def test_one_checkpoint_counts_at_any_time(found: Found) -> None:
    """The one before until the new one is whole and named, and none is lost until then."""
    for point in found.points:
        new = point["at"] > found.counts
        assert point["resumed"] == found.scenario.resumed[new], point
        assert set(point["whole"]) >= found.scenario.whole[new], point


def test_the_state_can_always_be_read(found: Found) -> None:
    """As the process before left it, or as this one does."""
    before = None if found.name == "first checkpoint" else "done"
    assert {point["state"] for point in found.points} == {before, "running"}


def test_goes_on_to_the_same_bits_and_leaves_nothing_behind(found: Found) -> None:
    assert [point["call"] for point in found.points if not point["equal"]] == []
    for point in found.points:
        assert point["left"] == found.end, point["call"]


class Disk:
    """What a power cut could take: contents and names that no fsync has followed."""

    def __init__(self) -> None:
        self.contents: set[str] = set()
        self.names: set[str] = set()

    def apply(self, call: str, paths: list[str]) -> None:
        path = paths[-1]
        if call in SYNCS:
            self.contents.discard(path)
            self.names -= {name for name in self.names if str(PurePath(name).parent) == path}
        elif call in RENAMES:
            moved = {name for name in self.contents | self.names if within(name, paths[0])}
            for kind in (self.contents, self.names):
                kind |= {path + name[len(paths[0]) :] for name in kind & moved}
                kind -= moved
            self.names.add(path)
        elif call == "rmdir":
            self.names = {name for name in self.names if not within(name, path)} | {path}
        else:
            self.contents |= {path} if call in OPENS | WRITES | SIZES else set()
            self.names |= {path} if call not in WRITES | SIZES else set()

    def at_risk(self, path: str) -> set[str]:
        """Of `path` and what is in it."""
        return {name for name in self.contents | self.names if within(name, path)}


def within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}/")


def test_all_is_on_the_disk_before_it_is_named(found: Found) -> None:
    """In the order of the calls: files, folder, its name, then `latest`, then the old one goes."""
    disk, seen = Disk(), []
    saved = found.scenario.saved
    latest = f"{PurePath(saved).parent}/latest"
    for name, paths in found.calls:
        if renames_to((name, paths), saved):
            seen.append("folder")
            assert disk.at_risk(paths[0]) - {paths[0]} == set()
        elif renames_to((name, paths), latest):
            seen.append("latest")
            assert disk.at_risk(saved) == set() and paths[0] not in disk.contents
        elif name in ("unlinkat", "unlink") and seen == ["folder", "latest"]:
            seen.append("removal")
            assert latest not in disk.names
        disk.apply(name, paths)
    removal = ["removal"] if found.name == "next checkpoint" else []
    assert seen == ["folder", "latest", *removal]


def test_the_order_is_noticed() -> None:
    disk = Disk()
    for call in ("mkdir a", "openat a/x", "write a/x", "fsync a/x", "openat a/y", "rename a b"):
        name, *paths = call.split()
        disk.apply(name, paths)
    assert disk.at_risk("b") == {"b", "b/x", "b/y"} and disk.contents == {"b/y"}
    disk.apply("fsync", ["b"])
    assert disk.at_risk("b") == {"b", "b/y"}
    disk.apply("fsync", ["."])
    assert disk.at_risk("b") == {"b/y"}
