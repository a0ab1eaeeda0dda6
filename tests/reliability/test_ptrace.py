"""The tracer itself: it lists what changes files, notices what it does not list, kills in time."""

import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.reliability.ptrace import Kill, run_traced, tree


def all_kinds(folder: Path) -> None:
    """In two threads, by absolute paths and by open folders; reading is not listed."""
    thread = threading.Thread(target=lambda: (folder / "a").write_bytes(b"12345678"))
    thread.start()
    thread.join()
    (folder / "a").read_bytes()
    handle = os.open(folder, os.O_RDONLY)
    os.mkdir("b", dir_fd=handle)
    os.rename("a", "b/c", src_dir_fd=handle, dst_dir_fd=handle)
    os.fsync(handle)
    os.unlink("b/c", dir_fd=handle)
    Path(folder.parent, "elsewhere").write_text("not looked at")


def through_memory(folder: Path) -> None:
    with open(folder / "a", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[0] = 65
        memory.flush()
        os.utime(folder / "a", ns=(1, 1))


ACTIONS = {action.__name__: action for action in (all_kinds, through_memory)}
LISTED = [
    ["openat", "a"],
    ["write", "a"],
    ["mkdirat", "b"],
    ["renameat", "a", "b/c"],
    ["fsync", "."],
    ["unlinkat", "b/c"],
]


def worker() -> None:
    action, folder, *kill = json.loads(sys.argv[1])
    place = Path(folder)
    found = run_traced(lambda: ACTIONS[action](place), place, Kill(*kill) if kill else None)
    calls = [[call.name, *call.paths] for call in found.calls]
    print(json.dumps([calls, len(found.unlisted), found.status, tree(place)]))


def traced(*arguments: object) -> list:
    """In a process of its own, which must have no other children."""
    code = "from tests.reliability.test_ptrace import worker; worker()"
    command = [
        sys.executable,
        "-c",
        code,
        json.dumps([*map(str, arguments[:2]), *arguments[2:]]),
    ]
    return json.loads(subprocess.check_output(command, cwd=ROOT, timeout=60))


def test_lists_what_changes_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert traced("all_kinds", tmp_path / "in") == [LISTED, 0, 0, {"b": -1}]


def test_notices_what_it_does_not_list(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345678")
    calls, unlisted, status, _ = traced("through_memory", tmp_path)
    assert calls == [] and unlisted > 0 and status == 0


@pytest.mark.parametrize(
    ("at", "torn", "left"),
    [
        (0, False, {}),
        (1, False, {"a": 0}),
        (1, True, {"a": 4}),
        (2, False, {"a": 8}),
        (3, False, {"a": 8, "b": -1}),
        (5, False, {"b": -1, "b/c": 8}),
    ],
)
def test_kills_before_the_call(at: int, torn: bool, left: dict, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    calls, _, status, found = traced("all_kinds", tmp_path / "in", at, torn)
    assert calls == LISTED[: at + 1] and status == -9 and found == left
