"""Runs cases one by one, each in a process of its own: what is finished stays, time is kept."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.parts import AGAIN, ROOT, Case
from benchmarks.gpu_report.results import read_json, write_json
from fastgan.common.errors import UserError

# Before the limit of --minutes: for the report and the archive.
_RESERVE_SECONDS = 15
# How many times as long as expected a case may take, and what any may (a dry run: on a slow CPU):
# one that hangs must not take the time of all others.
_PATIENCE = 3
_LEAST_SECONDS, _LEAST_DRY_SECONDS = 120.0, 600.0
# Of a case that goes on in a new process: each of a step's variants may break one.
_PROCESSES = 8


CACHES = "caches"
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
# No GPU even where there is one; graphs are captured, but run as they were written (torch 2.13).
TRIAL = {
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    "TORCH_COMPILE_OVERRIDE_BACKENDS": ">=0:eager",
}


class TimeUp(Exception):
    """The case did not end in the time that was left."""


@dataclass
class Runner:
    """`run` fills `out` with results; `left` and `failed` then say what is missing.

    `minutes`: no case is started that would not end within them, and none runs beyond; a shorter
    one may still fit.
    `paths`: what the cases' processes find on their PYTHONPATH.
    """

    out: Path
    tiny: bool
    minutes: float | None = None
    paths: Sequence[str | Path] = ()
    left: list[Case] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = time.monotonic()

    def run(self, cases: Iterable[Case]) -> Iterator[Case]:
        """Yields every case that has just been finished."""
        todo = [case for case in cases if not case.result(self.out).is_file()]
        for number, case in enumerate(todo):
            ahead = sum(each.seconds for each in todo[number:])
            if not self._fits(case):
                self.left.append(case)
                continue
            self._say(f"[{number + 1}/{len(todo)}] {case.label}", ahead)
            try:
                self._finish(case)
            except TimeUp:
                self.left.append(case)
            except UserError as error:
                self.failed[case.label] = str(error)
                print(f"  failed: {error}", flush=True)
            else:
                yield case

    def _fits(self, case: Case) -> bool:
        remaining = self._remaining()
        # What resumes may begin with less: but to build and then to stop would help nobody.
        needed = 0 if self.tiny else case.seconds / (2 if case.resumes else 1)
        return remaining is None or remaining > needed

    def _remaining(self) -> float | None:
        """Seconds that cases still have."""
        if self.minutes is None:
            return None
        return 60 * self.minutes - _RESERVE_SECONDS - (time.monotonic() - self._start)

    def _say(self, what: str, ahead: float) -> None:
        elapsed = (time.monotonic() - self._start) / 60
        expected = "" if self.tiny else f", about {ahead / 60:.0f} min to go on an H200"
        print(f"{what}, {elapsed:.1f} min elapsed{expected}", flush=True)

    def _finish(self, case: Case) -> None:
        """Runs the case until its result is there. UserError: it failed; TimeUp."""
        result, log = case.result(self.out), self.out / "logs" / f"{case.label}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        result.parent.mkdir(parents=True, exist_ok=True)
        aside = result.with_name(f".{result.name}")
        aside.unlink(missing_ok=True)
        start = time.monotonic()
        # What an earlier run said of it stays: its errors are to be mended elsewhere.
        with log.open("a") as output:
            before = output.tell()
            for _ in range(_PROCESSES):
                status = self._process(case, aside, output)
                # Killed, by the system or by itself, is one of the things to go on after.
                if not case.resumes or not (status == AGAIN or status < 0):
                    break
        if status not in case.accepted or not aside.is_file():
            line = _last_line(log, before)
            raise UserError(f"{line} (exit status {status}), {log}, see there")
        read_json(aside)
        os.replace(aside, result)
        print(f"  done in {time.monotonic() - start:.0f} s", flush=True)

    def _process(self, case: Case, aside: Path, output: Any) -> int:
        patience = max(
            _LEAST_DRY_SECONDS if self.tiny else _LEAST_SECONDS, _PATIENCE * case.seconds
        )
        remaining = self._remaining()
        limit = patience if remaining is None else min(patience, remaining)
        # A process group of its own, so that what the case started ends with it.
        process = subprocess.Popen(
            case.arguments(aside, self.out),
            cwd=ROOT,
            env=self._environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(1.0, limit))
        except subprocess.TimeoutExpired as error:
            print(f"  stopped after {limit:.0f} s", flush=True)
            if limit == patience:
                log = self.out / "logs" / f"{case.label}.log"
                raise UserError(
                    f"did not end in {limit:.0f} s, {log}, {case.seconds:.0f} were expected"
                ) from error
            raise TimeUp from error
        finally:
            _end(process)

    def _environment(self) -> dict[str, str]:
        found = {k: v for k, v in os.environ.items() if k != "FASTGAN_KERNELS"}
        paths = [*map(str, self.paths), str(ROOT), found.get("PYTHONPATH", "")]
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        found["PYTHONUNBUFFERED"] = "1"
        # The report's own caches: empty at its start, so that a first step is a first step.
        found |= {name: str(self.out / CACHES / name.lower()) for name in CACHE_VARIABLES}
        return found | (TRIAL if self.tiny else {})


def claim(out: Path, tiny: bool) -> None:
    """Makes the folder of a report. UserError: not writable, or of the other kind (dry or real)."""
    kind = out / "kind.json"
    if not kind.is_file():
        write_json(kind, {"dry_run": tiny})
    if read_json(kind).get("dry_run") is not tiny:
        found, wanted = ("a measurement", "a dry run") if tiny else ("a dry run", "a measurement")
        raise UserError(f"holds {found}, --out {out}, another folder for {wanted} would do")


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM ends this process as an exception would: running cases end with it."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends what the case left behind in its process group, and waits for the case."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    # A process that waits for its driver cannot even be killed: the others go on without it.
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)


def _last_line(log: Path, start: int) -> str:
    """What the log says from `start` on: its last error, behind which CUDA's have advice."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in reversed(text.splitlines()) if line.strip()]
    errors = (line for line in lines if re.match(r"error: |[\w.]+(Error|Exception): ", line))
    return next(errors, lines[0] if lines else "it printed nothing").removeprefix("error: ")
