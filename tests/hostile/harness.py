"""Reads broken and hostile files in a process of its own, and judges how every one of them ends.

A parser must either give a sound result or raise UserError with one printable line that names the
file; within a second or two and little memory; without running, importing, writing or reading
anything else. Python's audit events show the latter, resource limits and timers the former.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from fastgan.common.errors import UserError
from tests.hostile.watch import ROOT, install_audit, watched

MAX_CPU_SECONDS = 2.0
MAX_SECONDS = 30.0  # a read that waits for something costs no CPU time
MAX_BYTES = 256 << 20  # of resident memory, above what there was before the case
ADDRESS_SPACE = 1 << 30  # what may be reserved without being touched
MAX_LINE = 1500
LEAST_CASES = 300

Ending = Literal["refused", "valid", "failed"]


@dataclass(frozen=True)
class Case:
    """One input: a file's bytes, or what puts something at a path.

    `kind` groups cases in the printed table. `expected` says how it has to end; None where a change
    may be harmless (a flipped bit of a pixel).
    """

    kind: str
    name: str
    content: bytes | Callable[[Path], None]
    expected: Ending | None = None


@dataclass(frozen=True)
class Suite:
    """A parser and its cases.

    `read` parses the file at a path and asserts that the result is sound; `file` is its name.
    Refusals mention `named`, or the file's name. The files `beside` it are always there.
    """

    parser: str
    file: str
    cases: Callable[[], list[Case]]
    read: Callable[[Path], None]
    named: str | None = None
    beside: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `told` is the refusal's line, or what went wrong."""

    kind: str
    name: str
    ending: Ending
    told: str
    cpu_seconds: float
    peak_bytes: int


class TooSlow(BaseException):
    """Raised by the timers; no `except Exception` of a parser stops it."""


def run_apart(suite: str, timeout: float = 240) -> list[Outcome]:
    """The outcomes of `tests/hostile/<suite>.py`'s cases, from a process that only runs these."""
    command = [sys.executable, "-m", "tests.hostile.run", suite]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    outcomes = [Outcome(**json.loads(line)) for line in child.stdout.splitlines()]
    last = outcomes[-1].name if outcomes else "nothing"
    assert child.returncode == 0, f"died after {last} ({child.returncode}): {child.stderr[-2000:]}"
    assert not child.stderr, f"printed {child.stderr[-2000:]}"
    return outcomes


def assert_harmless(suite: str, least: int = LEAST_CASES) -> None:
    """Every case ended well, and there are enough: flips and truncations, refused and valid."""
    outcomes = run_apart(suite)
    failed = [f"{o.kind} {o.name}: {o.told}" for o in outcomes if o.ending == "failed"]
    assert not failed, "\n".join([f"{len(failed)} of {len(outcomes)} cases:", *failed[:20]])
    assert len(outcomes) >= least, f"{len(outcomes)} cases, {least} expected"
    assert len({(o.kind, o.name) for o in outcomes}) == len(outcomes), "two cases of one name"
    assert {"flip", "cut"} <= {o.kind for o in outcomes}, "no flips or no cuts"
    endings = Counter(o.ending for o in outcomes)
    assert endings["refused"] >= least / 3, "hardly any case is refused"
    assert endings["valid"], "no case is valid"


def judge(suite: Suite, case: Case, folder: Path) -> Outcome:
    """Reads one case in the empty `folder`."""
    path = folder / suite.file
    for name, content in suite.beside.items():
        (folder / name).write_bytes(content)
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content)
    before = contents(folder)
    reset_peak()
    start_bytes, start = resident("VmRSS"), time.process_time()
    with watched(folder) as seen, warnings.catch_warnings(record=True) as warned:
        ending, told = _ending(suite, path)
    seconds, peak = time.process_time() - start, resident("VmHWM") - start_bytes
    problems = list(dict.fromkeys(seen))
    problems += [f"warned: {w.message}" for w in warned]
    if contents(folder) != before:
        problems.append(f"left other files: {sorted(contents(folder))}")
    if peak > MAX_BYTES:
        problems.append(f"took {peak >> 20} MiB")
    if ending != "failed" and case.expected not in (None, ending):
        problems.append(f"{ending} where {case.expected} was expected: {told}")
    if problems:
        ending, told = "failed", "; ".join([*problems, told])
    return Outcome(case.kind, case.name, ending, told, round(seconds, 4), peak)


def _ending(suite: Suite, path: Path) -> tuple[Ending, str]:
    try:
        with time_limit():
            suite.read(path)
    except UserError as error:
        problem = _problem(error, suite.file if suite.named is None else suite.named)
        return (
            ("failed", f"{problem}: {str(error)[:300]!a}") if problem else ("refused", str(error))
        )
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {str(error)[:300]!a}"
    return "valid", ""


def _problem(error: UserError, named: str) -> str:
    """What is wrong with a refusal, or nothing."""
    message = str(error)
    if not message.isprintable():
        return "more than one printable line"
    if len(message) > MAX_LINE:
        return f"a line of {len(message)} characters"
    if named not in message:
        return f"{named} is not named"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate" in str(cause):
            return f"memory was asked for ({str(cause)[:100]})"
        cause = cause.__cause__ or cause.__context__
    return ""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises TooSlow in the block when its CPU time or its duration exceeds the limits."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(signal.Signals(number).name)

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, MAX_CPU_SECONDS)}
    timers[signal.ITIMER_REAL] = (signal.SIGALRM, MAX_SECONDS)
    for number, _ in timers.values():
        signal.signal(number, stop)
    try:
        for timer, (_, limit) in timers.items():
            signal.setitimer(timer, limit, limit)
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)


def limit_memory() -> None:
    """Lets the process reserve ADDRESS_SPACE more than it has; beyond that comes MemoryError."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + ADDRESS_SPACE, hard))


def resident(field: str) -> int:
    """A size of this process in bytes: VmRSS now, VmHWM at its peak, VmSize reserved."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) << 10


def reset_peak() -> None:
    with suppress(OSError):  # then the peak of all cases so far is compared
        Path("/proc/self/clear_refs").write_text("5")


def contents(folder: Path) -> dict[str, Any]:
    """Names, types and contents of all below `folder`."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        regular = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = status.st_mode, regular and path.read_bytes()
    return found


def run_cases(suite: Suite, folder: Path) -> Iterator[Outcome]:
    """Judges every case under the limits, which hold for this process from then on."""
    cases = suite.cases()
    limit_memory()
    for case in cases[:20]:  # imports whatever only some files need
        _fresh(folder)
        judge(suite, case, folder)
    limit_memory()
    install_audit()
    for case in cases:
        _fresh(folder)
        yield judge(suite, case, folder)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def as_line(outcome: Outcome) -> str:
    return json.dumps(asdict(outcome))
