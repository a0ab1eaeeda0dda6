"""Killed with SIGKILL at every system call that changes a run's files, nothing is lost."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pytest

from tests.processes import ROOT
from tests.reliability.kills import NOTICED, SCENARIOS

OPENS, WRITES = {"open", "openat", "creat"}, {"write", "pwrite64", "writev", "pwritev"}
SIZES = {"ftruncate", "truncate", "fallocate"}
SYNCS, RENAMES = {"fsync", "fdatasync"}, {"rename", "renameat", "renameat2"}
# Whose sizes depend on the time that things took.
REPORTS = ("log.txt", "stats.jsonl")


@dataclass
class Expected:
    """Of one scenario: what is saved, and what there must be before it counts and from then on."""

    saved: str
    resumed: tuple[int, int]
    whole: tuple[set[int], set[int]]


EXPECTED = {
    "first checkpoint": Expected("checkpoints/0000000004", (0, 4), (set(), {4})),
    "next checkpoint": Expected("checkpoints/0000000016", (12, 16), ({4, 8, 12}, {4, 12, 16})),
    "over an old one": Expected("checkpoints/0000000016", (12, 16), ({4, 12}, {4, 12, 16})),
    "dump": Expected(f"diverged/{NOTICED:010d}", (12, 12), ({4, 8, 12}, {4, 8, 12})),
}


@dataclass
class Found:
    """The findings about one scenario, see tests/reliability/kills.py."""

    name: str
    calls: list[tuple[str, list[str]]]
    trees: list[dict[str, int]]
    unlisted: list[int]
    end: list[str]
    points: list[dict[str, Any]]

    @property
    def expected(self) -> Expected:
        return EXPECTED[self.name]

    @property
    def counts(self) -> int:
        """The call that makes the new checkpoint count: `latest` is renamed into place.

        Of the first one it is its folder: without `latest` the newest counts.
        """
        name = f"{PurePath(self.expected.saved).parent}/latest"
        if self.name == "first checkpoint":
            name = self.expected.saved
        (at,) = [i for i, call in enumerate(self.calls) if renames_to(call, name)]
        return at


def renames_to(call: tuple[str, list[str]], path: str) -> bool:
    return call[0] in RENAMES and call[1][1] == path


def scenarios() -> list[Any]:
    others = [name for name in SCENARIOS if name != "next checkpoint"]
    return ["next checkpoint", *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.fixture(scope="module", params=scenarios())
def found(request: pytest.FixtureRequest) -> Found:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.reliability.kills", request.param],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    told["calls"] = [(call["name"], call["paths"]) for call in told["calls"]]
    return Found(request.param, **told)


def test_killed_at_every_call_there_is(found: Found) -> None:
    enumerated = [f"{name} {' -> '.join(paths)}" for name, paths in found.calls]
    injected = [point["call"] for point in found.points if not point["torn"]]
    assert injected == enumerated and len(enumerated) > 50
    torn = [point["call"] for point in found.points if point["torn"]]
    assert torn == [text for text in enumerated if text.split()[0] in WRITES] and torn
    assert {point["status"] for point in found.points} == {-signal.SIGKILL}


def test_no_other_call_changes_the_files(found: Found) -> None:
    assert found.unlisted == []


def test_the_call_did_not_happen(found: Found) -> None:
    """The files are those that it found."""
    for point, tree in zip(found.points, found.trees, strict=False):
        assert without_reports(point["where"]) == without_reports(tree), point["call"]


def without_reports(tree: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in tree.items() if name not in REPORTS}


def test_one_checkpoint_counts_at_any_time(found: Found) -> None:
    """The one before until the new one is whole and named, and none is lost until then."""
    indices = [*range(len(found.calls))]
    indices += [i for i in indices if found.calls[i][0] in WRITES]
    for point, index in zip(found.points, indices, strict=True):
        new = index > found.counts
        assert point["resumed"] == found.expected.resumed[new], point
        assert set(point["whole"]) >= found.expected.whole[new], point


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
    saved = found.expected.saved
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
