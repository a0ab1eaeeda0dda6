"""Checkpoints of a run: whole or absent, newest and best kept, damage told in one line.

And saving beside the training: what is written, when it is waited for, how failures come back.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from fastgan.checkpoint import store
from fastgan.checkpoint.network_file import load_network_file, network_from_file
from fastgan.checkpoint.store import (
    Checkpoint,
    CheckpointWriter,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fastgan.common.errors import UserError
from tests.conftest import TINY, live_network

AVERAGE = live_network(TINY).state_dict()


def save(folder: Path, nimg: int, *, keep: int = 2, **metrics: float) -> Path:
    training = {"generator/w": torch.full((3,), float(nimg)), "optimizer_g/w/step": torch.ones(())}
    facts = Checkpoint(dict(TINY), AVERAGE, training, nimg, nimg // 4, metrics, {"license": "L"})
    return save_checkpoint(folder, facts, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(p.name.lstrip("0") for p in folder.iterdir())


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    path = save(tmp_path, 40, FD=1.5)
    found = load_checkpoint(path)
    assert (found.nimg, found.iteration, found.metrics) == (40, 10, {"FD": 1.5})
    assert found.network_config == TINY
    assert found.average.keys() == AVERAGE.keys()
    assert all(torch.equal(found.average[n], t) for n, t in AVERAGE.items())
    assert found.training["generator/w"].tolist() == [40.0] * 3
    assert found.training["optimizer_g/w/step"].shape == ()


def test_the_average_is_a_network_file(tmp_path: Path) -> None:
    path = save(tmp_path, 40)
    file = load_network_file(path / "ema.safetensors")
    assert (file.metadata["kind"], file.nimg, file.metadata["license"]) == ("ema", 40, "L")
    network = network_from_file(path / "ema.safetensors")
    assert all(torch.equal(t, AVERAGE[n]) for n, t in network.state_dict().items())


def test_whoever_reads_other_files_reads_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    usual = (tmp_path / "other").stat().st_mode
    assert {
        path.name: path.stat().st_mode for path in save(tmp_path, 40).iterdir()
    } == dict.fromkeys(("ema.safetensors", "training.safetensors", "meta.json"), usual)


def test_latest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 40)
    path = save(tmp_path, 80)
    assert latest_checkpoint(tmp_path) == path and path.name == "0000000080"
    assert (tmp_path / "latest").read_text() == "0000000080\n"


@pytest.mark.parametrize(("keep", "left"), [(1, ["12"]), (2, ["12", "8"]), (0, ["12"])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[str]) -> None:
    for nimg in (4, 8, 12):
        save(tmp_path, nimg, keep=keep)
    assert names(tmp_path) == [*left, "latest"]


def test_the_best_is_kept_besides(tmp_path: Path) -> None:
    for nimg, value in ((4, 3.0), (8, 1.0), (12, 2.0), (16, float("nan")), (20, 9.0)):
        save(tmp_path, nimg, keep=1, FD=value)
    assert names(tmp_path) == ["20", "8", "latest"]


def test_a_checkpoint_just_written_is_never_dropped(tmp_path: Path) -> None:
    """After going back to an older checkpoint by hand, newer names lie beside the new one."""
    for nimg in (4, 8, 12, 16):
        save(tmp_path, nimg, keep=4)
    path = save(tmp_path, 6, keep=2)
    assert latest_checkpoint(tmp_path) == path
    assert names(tmp_path) == ["12", "16", "6", "latest"]


def test_writing_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 4, FD=1.0)
    assert load_checkpoint(save(tmp_path, 4, FD=2.0)).metrics == {"FD": 2.0}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before = save(tmp_path, 4)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write a checkpoint .*No space left"):
        save(tmp_path, 8)
    assert names(tmp_path) == ["4", "latest"] and latest_checkpoint(tmp_path) == before


@pytest.mark.parametrize("survived", [0, 1, 2, 3])
def test_a_power_cut_before_the_pointer_moves_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    before = save(tmp_path, 4)
    moves: list[str] = []
    replace = os.replace

    def cut(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        if len(moves) == survived:
            raise KeyboardInterrupt
        moves.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 8)
    assert moves == ["ema.safetensors", "training.safetensors", "0000000008"][:survived]
    assert latest_checkpoint(tmp_path) == before and load_checkpoint(before).nimg == 4
    # The half-written folder is in nobody's way.
    assert load_checkpoint(save(tmp_path, 8)).nimg == 8
    assert names(tmp_path) == ["4", "8", "latest"]


@pytest.mark.parametrize("text", ["", "../0000000004", "9", "\xff\xfe"])
def test_a_pointer_to_nowhere(tmp_path: Path, text: str) -> None:
    save(tmp_path, 4)
    (tmp_path / "latest").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"latest names no checkpoint beside it"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("ema.safetensors", "truncated"),
        ("training.safetensors", "truncated"),
        ("training.safetensors", "missing"),
        ("meta.json", "truncated"),
        ("meta.json", "missing"),
        ("meta.json", "[1, 2]"),
        ("meta.json", "[" * 100_000),
        ("meta.json", '{"nimg": 1e999, "iteration": 0, "metrics": {}, "sha256": {}}'),
        ("meta.json", "pipe"),
        *(("meta.json", facts) for facts in ({"nimg": "x"}, {"metrics": 3}, {"sha256": "0"})),
    ],
)
def test_damage_is_told_in_one_line(
    tmp_path: Path, file: str, damage: str | dict[str, Any]
) -> None:
    path = save(tmp_path, 4)
    content = (path / file).read_bytes()
    (path / file).unlink()
    if damage == "pipe":  # which keeps nobody waiting
        os.mkfifo(path / file)
    elif isinstance(damage, dict):
        (path / file).write_text(json.dumps(json.loads(content) | damage))
    elif damage != "missing":
        (path / file).write_bytes(content[:-9] if damage == "truncated" else damage.encode())
    with pytest.raises(UserError, match="damaged checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and "0000000004" in str(caught.value)
    # A neighbour that is damaged does not stop the next checkpoint.
    save(tmp_path, 8)


def test_leftovers_of_killed_saves_go_and_nothing_else(tmp_path: Path) -> None:
    for name in (".0000000040.part", ".snapshot"):
        (tmp_path / name).mkdir()
    (tmp_path / ".latest.abcd.part").touch()
    save(tmp_path, 40)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".snapshot", "0000000040", "latest"]


def checkpoint(nimg: int, value: torch.Tensor) -> Checkpoint:
    return Checkpoint(dict(TINY), AVERAGE, {"generator/w": value}, nimg, nimg // 4, {}, {})


def saved(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir())


class Held:
    """save_checkpoint, which waits until it may, and tells that it began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may = threading.Semaphore(0), threading.Semaphore(0)
        self._save = store.save_checkpoint
        monkeypatch.setattr(store, "save_checkpoint", self)

    def __call__(self, *given: object, **named: object) -> Path:
        self.begun.release()
        assert self.may.acquire(timeout=30)
        return self._save(*given, **named)  # type: ignore[arg-type]


def test_values_are_those_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, value = Held(monkeypatch), torch.ones(3)
    with CheckpointWriter(tmp_path, keep=2, main=True) as writer:
        writer.save(checkpoint(4, value))
        assert held.begun.acquire(timeout=30)
        value.zero_()
        assert not (tmp_path / "latest").exists()
        held.may.release()
    assert load_checkpoint(tmp_path / "0000000004").training["generator/w"].tolist() == [1.0] * 3


def test_one_at_a_time_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with CheckpointWriter(tmp_path, keep=5, main=True) as writer:
        writer.save(checkpoint(4, torch.ones(3)))
        second = threading.Thread(target=writer.save, args=(checkpoint(8, torch.ones(3)),))
        second.start()
        assert held.begun.acquire(timeout=30)
        assert not held.begun.acquire(timeout=0.2) and second.is_alive()
        held.may.release(2)
        second.join(timeout=30)
    assert saved(tmp_path) == [4, 8]


@pytest.mark.parametrize("how", ["check", "save", "finish", "leave"])
def test_a_failure_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def full(*given: object, **named: object) -> Path:
        raise UserError("no space left")

    monkeypatch.setattr(store, "save_checkpoint", full)
    with (
        pytest.raises(UserError, match="no space left"),
        CheckpointWriter(tmp_path, keep=2, main=True) as writer,
    ):
        writer.save(checkpoint(4, torch.ones(3)))
        writer._thread.submit(lambda: None).result()
        if how == "save":
            writer.save(checkpoint(8, torch.ones(3)))
        elif how != "leave":
            getattr(writer, how)()
        assert how == "leave"


def test_what_ends_the_block_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    held.may.release()
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, keep=2, main=True) as writer:
        writer.save(checkpoint(4, torch.ones(3)))
        raise ZeroDivisionError
    # And what had begun is written.
    assert load_checkpoint(tmp_path / "0000000004").nimg == 4


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep=2, main=False) as writer:
        writer.save(checkpoint(4, torch.ones(3)))
    assert list(tmp_path.iterdir()) == []
