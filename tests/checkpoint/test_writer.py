"""Saving beside the training: what is written, when it is waited for, how failures come back."""

import threading
from pathlib import Path

import pytest
import torch

from fastgan.checkpoint import store as module
from fastgan.checkpoint.store import Checkpoint, CheckpointWriter, load_checkpoint
from fastgan.common.errors import UserError
from tests.conftest import TINY, live_network

AVERAGE = live_network(TINY).state_dict()


def checkpoint(nimg: int, value: torch.Tensor) -> Checkpoint:
    return Checkpoint(dict(TINY), AVERAGE, {"generator/w": value}, nimg, nimg // 4, {}, {})


def saved(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir())


class Held:
    """save_checkpoint, which waits until it may, and tells that it began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may = threading.Semaphore(0), threading.Semaphore(0)
        self._save = module.save_checkpoint
        monkeypatch.setattr(module, "save_checkpoint", self)

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

    monkeypatch.setattr(module, "save_checkpoint", full)
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
