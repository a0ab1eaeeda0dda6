"""Saving beside the training: the step waits for the copy to be ordered, not for the disk."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastgan.checkpoint.store import Checkpoint, save_checkpoint


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
        arrived = torch.cuda.Event() if _on_gpu(checkpoint) else None
        if arrived is not None:
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


def _on_gpu(checkpoint: Checkpoint) -> bool:
    return any(t.is_cuda for t in checkpoint.average.values())
