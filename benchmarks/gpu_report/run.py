"""Runs cases one by one, each in a process of its own with a time limit; what is finished stays.

A case's result is one JSON file, which it rewrites as it goes: `complete` once it has ended, and
`error`, one line, where it ended badly. A case that is complete is not run again.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Content, header
from fastgan.common.files import replace_atomically

ROOT = Path(__file__).resolve().parents[2]
# Before the limit of --minutes: for the report.
RESERVE_SECONDS = 15.0
# How many times as long as expected a case may take, and what any may (a dry run: on a slow CPU).
PATIENCE, LEAST_SECONDS, LEAST_DRY_SECONDS = 3, 120.0, 600.0
# No GPU even where there is one; graphs are captured, but run as they were written (torch 2.13).
DRY = {
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    "TORCH_COMPILE_OVERRIDE_BACKENDS": ">=0:eager",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Place:
    """Where a case leaves what it finds: `note` as it goes, what is no JSON in `folder`."""

    out: Path
    name: str
    tiny: bool

    @property
    def result(self) -> Path:
        return self.out / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def caches(self) -> Path:
        """What does not come home: compiled graphs, and the runs of trainings."""
        return self.out.with_name(f"{self.out.name}-caches")

    def note(self, content: Content, *, complete: bool = False) -> None:
        write_json(self.result, header() | content | {"complete": complete})

    def found(self) -> Content:
        """What is there, of the same kind (dry or real); what cannot be read is measured again."""
        try:
            content = json.loads(self.result.read_text())
            return content if content["dry_run"] is self.tiny else {}
        except (OSError, ValueError, TypeError, LookupError):
            return {}


@dataclass(frozen=True)
class Case:
    """One process, named PART/CASE. `seconds`: expected on an H200; `measure` returns the content
    of its result."""

    name: str
    seconds: float
    measure: Callable[[Place], Content]

    @property
    def part(self) -> str:
        return self.name.partition("/")[0]


def write_json(path: Path, content: object) -> None:
    """Replaces `path` by `content`; a reader sees the old file or the new one."""
    with replace_atomically(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


class Runner:
    """`run` fills `out` with results; `left` and `failed` then name what is missing.

    `minutes`: no case is begun that would not end within them, and none runs beyond.
    """

    def __init__(self, out: Path, tiny: bool, minutes: float | None = None) -> None:
        self.out, self.tiny = out.resolve(), tiny
        self.left: list[str] = []
        self.failed: list[str] = []
        self._start = time.monotonic()
        self._seconds = float("inf") if minutes is None else 60 * minutes - RESERVE_SECONDS

    def run(self, cases: Iterable[Case]) -> Iterator[Case]:
        """Yields what has just been run."""
        for case in cases:
            if self.place(case).found().get("complete"):
                continue
            if self._remaining() <= (0 if self.tiny else case.seconds):
                self.left.append(case.name)
                continue
            elapsed = (time.monotonic() - self._start) / 60
            print(f"{case.name}, {elapsed:.1f} min elapsed", flush=True)
            process = self._begin(case)
            try:
                self._wait(case, process)
            finally:
                _end(process)
            yield case

    def place(self, case: Case) -> Place:
        return Place(self.out, case.name, self.tiny)

    def _remaining(self) -> float:
        return self._seconds - (time.monotonic() - self._start)

    def _wait(self, case: Case, process: subprocess.Popen[bytes]) -> None:
        place, remaining = self.place(case), self._remaining()
        least = LEAST_DRY_SECONDS if self.tiny else LEAST_SECONDS
        patience = max(least, PATIENCE * case.seconds)
        try:
            status = process.wait(max(0.0, min(patience, remaining)))
        except subprocess.TimeoutExpired:
            if remaining < patience:
                self.left.append(case.name)
                print(f"  {case.name}: stopped, time is up", flush=True)
                return
            error = f"did not end in {patience:.0f} s, {case.seconds:.0f} were expected"
        else:
            if status == 0 and place.found().get("complete"):
                return
            error = f"{_last_error(self._log(case))} (exit status {status})"
        self.failed.append(case.name)
        print(f"  {case.name}: failed: {error}", flush=True)
        # What it had noted until then stays.
        about = {"dry_run": self.tiny, "chip": None}
        write_json(place.result, about | place.found() | {"error": error, "complete": False})

    def _log(self, case: Case) -> Path:
        return self.out / "logs" / f"{case.name}.log"

    def command(self, case: Case) -> list[str]:
        """What runs a case: this tool, told to do that one here."""
        words = ["--one", case.name, "--out", str(self.out), *(["--tiny"] if self.tiny else [])]
        return [sys.executable, str(ROOT / "tools/gpu_report.py"), *words]

    def _begin(self, case: Case) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if k != "FASTGAN_KERNELS"}
        # Caches begin empty, so that a first step is a first step.
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            environment[name] = str(self.place(case).caches / name.lower())
        environment |= {"PYTHONUNBUFFERED": "1"} | (DRY if self.tiny else {})
        self._log(case).parent.mkdir(parents=True, exist_ok=True)
        # What an earlier run said of it stays: its errors are to be mended elsewhere. The process
        # gets a group of its own, so that what the case started ends with it.
        with self._log(case).open("ab") as log:
            return subprocess.Popen(
                self.command(case),
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends what the case left behind in its process group. A process that waits for its driver
    cannot even be killed: the others go on without it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=5)


def _last_error(log: Path) -> str:
    """What the log says: its last error, behind which CUDA's have advice."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception): ", line)]
    return [*(lines or ["it printed nothing"])[-1:], *errors][-1].removeprefix("error: ")
