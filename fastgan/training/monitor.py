"""What a run tells: stats.jsonl, log.txt, state.json, a progress bar; averages between ticks."""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastgan.common.run_state import RunState, Status, write_state


class Averages:
    """Sums scalars on their device; `take` reads the means once a tick and starts over.

    Between the ticks nothing is allocated and the device is not asked.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, scalars: dict[str, Tensor]) -> None:
        for name, value in scalars.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(value)
            self._counts[name] += 1
        torch._foreach_add_([self._sums[name] for name in scalars], list(scalars.values()))

    def take(self) -> dict[str, float]:
        means = {name: float(self._sums[name]) / count for name, count in self._counts.items()}
        for total in self._sums.values():
            total.zero_()
        self._counts.clear()
        return means


class Monitor:
    """Writes a run's records and counts its images; silent on every process but the first.

    `full_speed`: images per second at which every GPU would compute at its peak rate, all
    processes together; None where that is not known, and then Timing/mfu is left out.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_images: int,
        nimg: int,
        device: torch.device,
        main: bool,
        full_speed: float | None = None,
    ) -> None:
        self.run_dir, self.device, self.main, self.nimg = run_dir, device, main, nimg
        self.full_speed = full_speed
        self._start = self._tick_start = time.perf_counter()
        self._tick_nimg = nimg
        self._after_first = self._start, nimg
        self._bar = tqdm(
            total=total_images,
            initial=nimg,
            unit="img",
            unit_scale=True,
            disable=not main,
            file=sys.stderr,
            mininterval=1.0,
        )

    def advance(self, images: int) -> None:
        self.nimg += images
        self._bar.update(images)

    def first_iteration(self) -> None:
        """Says how long the start took; img/s counts what follows, if anything does."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._after_first = time.perf_counter(), self.nimg
        self.log(f"first iteration after {self._after_first[0] - self._start:.1f} s")

    def tick(self, means: dict[str, float]) -> None:
        """One line of stats.jsonl and log.txt about the images since the last tick."""
        now = time.perf_counter()
        if self._tick_nimg < self._after_first[1] < self.nimg:
            self._tick_start, self._tick_nimg = self._after_first
        images, seconds = self.nimg - self._tick_nimg, now - self._tick_start
        self._tick_start, self._tick_nimg = now, self.nimg
        stats = {
            "Progress/kimg": self.nimg / 1000,
            "Timing/img_per_sec": images / seconds,
            "Timing/sec_per_kimg": 1000 * seconds / images,
            "Resources/peak_gpu_mem_gb": self._peak_memory_gb(),
            **means,
            "timestamp": time.time(),
        }
        if self.full_speed is not None:
            stats["Timing/mfu"] = stats["Timing/img_per_sec"] / self.full_speed
        self.record(stats)
        losses = " ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in sorted(means.items()))
        speed = f"{stats['Timing/img_per_sec']:8.1f} img/s"
        self.log(f"{self.nimg / 1000:9.1f} kimg  {speed}  {losses}")

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leaves what happens within (an evaluation, a checkpoint) out of img/s."""
        start = time.perf_counter()
        yield
        stopped = time.perf_counter() - start
        self._tick_start += stopped
        self._after_first = self._after_first[0] + stopped, self._after_first[1]

    def metrics(self, values: dict[str, float]) -> None:
        """What a snapshot measured, if it did, to stats.jsonl and log.txt."""
        if values:
            self.record({"Progress/kimg": self.nimg / 1000, **values})
            text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.log(f"{self.nimg / 1000:9.1f} kimg  {text}")

    def record(self, values: dict[str, float]) -> None:
        """Appends one JSON object to stats.jsonl; null stands for what is not finite."""
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        if self.main:
            with (self.run_dir / "stats.jsonl").open("a") as file:
                file.write(json.dumps(finite) + "\n")

    def log(self, line: str) -> None:
        """Appends to log.txt and prints above the progress bar."""
        if self.main:
            with (self.run_dir / "log.txt").open("a") as file:
                file.write(line + "\n")
            self._bar.write(line, file=sys.stderr)

    def state(self, status: Status, exit_code: int | None, message: str = "") -> None:
        """Replaces state.json: what a scheduler or a script asks a run for."""
        if self.main:
            write_state(self.run_dir, RunState(status, self.nimg, exit_code, message))

    def close(self) -> None:
        self._bar.close()

    def _peak_memory_gb(self) -> float:
        if self.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_allocated(self.device) / 2**30


# After this many iterations in a row with something left out the run has diverged.
MAX_SKIPPED = 10
# Exit status of a diverged run.
DIVERGED = 3
# Mean sign of D's logits, over a tick, beyond which D makes no mistakes that G could learn from.
SURE = 0.98
# Spread of the fakes of a batch, relative to the reals', below which G makes few different images.
LEAST_DIVERSITY = 0.5


class Diverged(Exception):
    """Too many iterations in a row had something not finite; commands exit with DIVERGED."""


class Skips:
    """Counts updates left out, on their device; the host asks once a tick."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts: dict[str, Tensor] = {}
        self._some, self._in_a_row, self._longest = torch.zeros(3, device=device).unbind()

    def add(self, skipped: dict[str, Tensor]) -> None:
        """`skipped`: for every update of an iteration 1 where it was left out, else 0."""
        self._some.zero_()
        for name, left_out in skipped.items():
            if name not in self._counts:
                self._counts[name] = torch.zeros((), device=self._device)
            self._counts[name].add_(left_out)
            torch.maximum(self._some, left_out, out=self._some)
        self._in_a_row.add_(1).mul_(self._some)
        torch.maximum(self._longest, self._in_a_row, out=self._longest)

    def take(self) -> dict[str, int]:
        """How many of each update were left out since it was asked last; no zeros."""
        counts = {name: int(total) for name, total in self._counts.items()}
        for total in self._counts.values():
            total.zero_()
        return {name: count for name, count in counts.items() if count}

    def longest(self) -> int:
        """The most iterations in a row with something left out, since the start."""
        return int(self._longest)


class Health:
    """Says once what looks wrong in a tick's means, and again only after it looked right."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def warnings(self, means: dict[str, float]) -> list[str]:
        """New warnings, a line each, with advice; `means` are by the statistics file's names."""
        found = {}
        real, fake = means.get("Loss/sign_real", 0.0), means.get("Loss/sign_fake", 0.0)
        if real > SURE and fake < -SURE:
            found["sure"] = (
                f"warning: D tells all images apart (mean signs {real:.2f} and {fake:.2f}), G gets "
                "little to learn from; a lower optim.lr_d, a higher loss.r1_gamma or more of "
                "discriminator.augment would help"
            )
        if means.get("Loss/diversity", 1.0) < LEAST_DIVERSITY:
            found["collapse"] = (
                f"warning: fakes of a batch differ {means['Loss/diversity']:.2f} times as much as "
                "reals, G may be collapsing; see the grids in samples/; a lower optim.lr_g, a "
                "higher freeze.level or an earlier checkpoint would help"
            )
        new = [line for kind, line in found.items() if kind not in self._said]
        self._said = set(found)
        return new
