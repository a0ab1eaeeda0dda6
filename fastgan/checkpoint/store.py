"""Checkpoints of a run: written aside, renamed into place, `latest` moved last.

All of it in a thread of its own, while the training goes on.

`checkpoints/<nimg>/` holds `ema.safetensors` (the public network file that sampling and evaluation
read), `training.safetensors` (trainable parameters, discriminator, optimisers) and `meta.json`.
`checkpoints/latest` is a text file naming the folder to resume from.
"""

import json
import math
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgan.checkpoint.network_file import load_network_file, save_network
from fastgan.common.errors import UserError
from fastgan.common.files import (
    PART,
    file_sha256,
    parse_object,
    read_bounded,
    replacement,
    sweep,
    sync,
)

EMA = "ema.safetensors"
TRAINING = "training.safetensors"
META = "meta.json"
LATEST = "latest"
_MAX_META_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """One saved state: the averaged network, everything else that training needs, and facts."""

    network_config: dict[str, Any]
    average: dict[str, Tensor]
    training: dict[str, Tensor]
    nimg: int
    iteration: int
    metrics: dict[str, float]
    provenance: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes `folder/<nimg>`, points `latest` at it and drops all but the newest `keep`.

    meta.json holds the other files' sha256, so that a changed bit is found when they are read.
    The checkpoint with the lowest metric is kept besides.
    """
    target = folder / f"{checkpoint.nimg:010d}"
    aside = folder / f".{target.name}{PART}"
    sweep(folder)
    try:
        aside.mkdir(parents=True)
        save_network(
            aside / EMA,
            checkpoint.network_config,
            checkpoint.average,
            kind="ema",
            nimg=checkpoint.nimg,
            provenance=checkpoint.provenance,
        )
        with replacement(aside / TRAINING) as training:
            save_file({n: t.contiguous() for n, t in checkpoint.training.items()}, training)
        facts = {
            "nimg": checkpoint.nimg,
            "iteration": checkpoint.iteration,
            "metrics": checkpoint.metrics,
            "sha256": {name: file_sha256(aside / name) for name in (EMA, TRAINING)},
        }
        (aside / META).write_text(json.dumps(facts, indent=2) + "\n")
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        sync(folder)
        with replacement(folder / LATEST) as pointer:
            pointer.write_text(f"{target.name}\n")
            sync(pointer)
        sync(folder)
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"cannot write a checkpoint ({error}), {target}, free space would be right"
        ) from error
    _drop_old(folder, target, keep)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The folder that `latest` names, None before the first checkpoint."""
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    try:
        name = read_bounded(pointer, 64).decode(errors="replace").strip()
    except (OSError, ValueError):
        name = ""
    if not _is_number(name) or not (folder / name).is_dir():
        raise UserError(f"{pointer} names no checkpoint beside it, the name of one would be right")
    return folder / name


def resumable(folder: Path) -> list[Path]:
    """Where a run may go on, best first: what `latest` names, then what was saved before that.

    All there is, newest first, where `latest` is damaged or absent.
    """
    saved = _saved(folder)[::-1]
    try:
        latest = latest_checkpoint(folder)
    except UserError:
        return saved
    return [path for path in saved if latest is None or path.name <= latest.name]


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads what `save_checkpoint` wrote; UserError naming the file that is missing or damaged."""
    try:
        facts = _facts(path)
        for name in (EMA, TRAINING):
            if file_sha256(path / name) != facts["sha256"][name]:
                raise ValueError(f"{name} is not what was written")
        training = load_file(path / TRAINING)
        network = load_network_file(path / EMA)
        return Checkpoint(
            network_config=dict(network.config),
            average=dict(network.state),
            training=training,
            nimg=int(facts["nimg"]),
            iteration=int(facts["iteration"]),
            metrics=dict(facts["metrics"]),
            provenance={},
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"damaged checkpoint ({error}), {path}, "
            "another checkpoint's name in `latest` would resume from there"
        ) from error


def _drop_old(folder: Path, newest: Path, keep: int) -> None:
    saved = _saved(folder)
    # By name `newest` is not the last one in a run taken up again from an older checkpoint.
    kept = {newest, *saved[-max(keep, 1) :]}
    scored = [(min(metrics.values()), path) for path in saved if (metrics := _metrics(path))]
    if scored:
        kept.add(min(scored)[1])
    for path in saved:
        if path not in kept:
            shutil.rmtree(path)


def _saved(folder: Path) -> list[Path]:
    """Every checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _is_number(p.name) and p.is_dir())


def _metrics(path: Path) -> dict[str, float]:
    try:
        metrics = _facts(path)["metrics"]
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _facts(path: Path) -> dict[str, Any]:
    return parse_object(read_bounded(path / META, _MAX_META_BYTES))


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


class CheckpointWriter:
    """Writes checkpoints into `folder` in a thread of its own, one at a time, in order.

    What a write fails with (UserError) is raised by the next call of any method, or at the end of
    the `with` block, which waits for the last one. Does nothing on processes that are not `main`.
    """

    def __init__(self, folder: Path, *, keep: int, main: bool) -> None:
        self.folder, self.keep, self.main = folder, keep, main
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[Path] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.finish()

    def save(self, checkpoint: Checkpoint) -> None:
        """Begins to write the tensors' present values; they may change once this returns.

        Waits for the checkpoint before, so that two copies are held at most.
        """
        if not self.main:
            return
        self.finish()
        copied = replace(
            checkpoint,
            average=_copied(checkpoint.average),
            training=_copied(checkpoint.training),
        )
        arrived = None
        if any(t.is_cuda for t in checkpoint.average.values()):
            arrived = torch.cuda.Event()
            arrived.record()
        self._written = self._thread.submit(self._write, copied, arrived)

    def check(self) -> None:
        """Raises what a write that has ended failed with."""
        if self._written is not None and self._written.done():
            self.finish()

    def finish(self) -> None:
        """Waits until all is written."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _write(self, checkpoint: Checkpoint, arrived: torch.cuda.Event | None) -> Path:
        if arrived is not None:
            arrived.synchronize()
        return save_checkpoint(self.folder, checkpoint, keep=self.keep)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU; a GPU's arrive when its stream, which orders them before later updates, is there.

    Into pinned memory, without which a copy from a GPU waits for it.
    """
    return {
        name: torch.empty_like(t, device="cpu", pin_memory=t.is_cuda).copy_(t, non_blocking=True)
        for name, t in tensors.items()
    }
