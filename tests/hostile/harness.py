"""Reads broken and hostile files in a process of its own, and judges how every one of them ends.

A parser must either give a sound result or raise UserError with one printable line that names the
file; within a second or two and little memory; without running, importing, writing or reading
anything else. Python's audit events show the latter, resource limits and timers the former.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from fastgan.common.errors import UserError, origins

PARSERS = ("command_line", "config_yaml", "dataset_json", "dataset_zip")
PARSERS += ("edm_pickle", "network_file", "state_json", "statistics_npz")
MAX_CPU_SECONDS = 2.0
MAX_SECONDS = 30.0  # a read that waits for something costs no CPU time
MAX_BYTES = 256 << 20  # of resident memory, above what there was before the case
ADDRESS_SPACE = 1 << 30  # what may be reserved without being touched
MAX_LINE = 1500

ROOT = Path(__file__).resolve().parents[2]
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")
_RUNS += ("pty.spawn", "socket.", "ctypes.", "urllib.Request", "webbrowser.", "pickle.find_class")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
_CHANGES += ("os.link", "os.symlink", "shutil.rmtree", "shutil.move", "shutil.copyfile")
_OURS = {str(ROOT / name) for name in ("fastgan", "kernels", "configs")}
_LIBRARIES = tuple({sys.prefix, sys.base_prefix} | _OURS)
_watched: dict[str, Any] = {"folder": None, "seen": []}

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

    parser: str
    kind: str
    name: str
    ending: Ending
    told: str
    cpu_seconds: float


class TooSlow(BaseException):
    """Raised by the timers; no `except Exception` of a parser stops it."""


def spread(cases: list[Case], most: int) -> list[Case]:
    """At most `most` of every kind, evenly."""
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    return [case for same in kinds.values() for case in same[:: -(-len(same) // most)]]


def run_apart(*parsers: str, most: int = 10**6, timeout: float = 600) -> list[Outcome]:
    """The outcomes of a spread of `tests/hostile/<parser>.py`'s cases, from one process."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.hostile.run", str(most), *parsers],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    outcomes = [Outcome(**json.loads(line)) for line in child.stdout.splitlines()]
    last = outcomes[-1].name if outcomes else "nothing"
    assert child.returncode == 0, f"died after {last} ({child.returncode}): {child.stderr[-2000:]}"
    assert not child.stderr, f"printed {child.stderr[-2000:]}"
    return outcomes


def run_here(parser: str, most: int) -> Iterator[str]:
    """Judges cases under the limits, which hold for this process from then on: a line of each."""
    suite = import_module(f"tests.hostile.{parser}").SUITE
    cases = spread(suite.cases(), most)
    for case in spread(cases, 1):  # imports whatever only some files need
        _judged(suite, case)
    limit_memory()
    for case in cases:
        yield json.dumps(asdict(_judged(suite, case)))


def _judged(suite: Suite, case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above, "case")
        folder.mkdir()
        return judge(suite, case, folder)


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
    with suppress(OSError):  # then the peak of all cases so far is compared
        Path("/proc/self/clear_refs").write_text("5")
    start_bytes, start = size_of_process("VmRSS"), time.process_time()
    with watched(folder) as seen, warnings.catch_warnings(record=True) as warned:
        ending, told = _ending(suite, path)
    seconds, peak = time.process_time() - start, size_of_process("VmHWM") - start_bytes
    problems = [*dict.fromkeys(seen), *(f"warned: {w.message}" for w in warned)]
    if contents(folder) != before:
        problems.append(f"left other files: {sorted(contents(folder))}")
    if peak > MAX_BYTES:
        problems.append(f"took {peak >> 20} MiB")
    if ending != "failed" and case.expected not in (None, ending):
        problems.append(f"{ending} where {case.expected} was expected: {told}")
    if problems:
        ending, told = "failed", "; ".join([*problems, told])
    return Outcome(suite.parser, case.kind, case.name, ending, told, round(seconds, 4))


def _ending(suite: Suite, path: Path) -> tuple[Ending, str]:
    try:
        with time_limit():
            suite.read(path)
    except UserError as error:
        problem = _problem(error, suite.file if suite.named is None else suite.named)
        if problem:
            return "failed", f"{problem}: {str(error)[:300]!a}"
        return "refused", str(error)
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
    for cause in origins(error):
        if isinstance(cause, MemoryError) or "allocate" in str(cause):
            return f"memory was asked for ({str(cause)[:100]})"
    return ""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises TooSlow in the block when its CPU time or its duration exceeds the limits."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(signal.Signals(number).name)

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS, MAX_CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, MAX_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def limit_memory() -> None:
    """Lets the process reserve ADDRESS_SPACE more than it has; beyond that comes MemoryError."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size_of_process("VmSize") + ADDRESS_SPACE, hard))


def size_of_process(kind: str) -> int:
    """Of this process in bytes: VmRSS resident now, VmHWM at its peak, VmSize reserved."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) << 10


def contents(folder: Path) -> dict[str, Any]:
    """Names, types and contents of all below `folder`."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        regular = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.lstat().st_mode, regular and path.read_bytes()
    return found


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Fills the list with what the block runs, imports, writes, or reads outside `folder`."""
    _watched.update(folder=os.path.realpath(folder), seen=[])
    try:
        yield _watched["seen"]
    finally:
        _watched["folder"] = None


def install_audit() -> None:
    """Audit hooks stay for the life of a process."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _watched["folder"] is None:
            return
        folder, _watched["folder"] = _watched["folder"], None  # what follows has events of its own
        try:
            if _is_wrong(event, arguments, folder):
                _watched["seen"].append(f"{event} {str(arguments)[:200]!a}")
        finally:
            _watched["folder"] = folder

    sys.addaudithook(hook)


def _is_wrong(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int):
            return False
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        return not (_is_inside(path, (folder,)) or (not writes and _is_inside(path, _LIBRARIES)))
    if event == "import":
        top = arguments[0].partition(".")[0]
        return top not in sys.modules and top not in sys.stdlib_module_names
    if event == "exec":
        return arguments[0].co_filename == "<string>"
    if event.startswith(_CHANGES):
        return not _is_inside(arguments[0], (folder,))
    return event.startswith(_RUNS)


def _is_inside(path: Any, folders: tuple[str, ...]) -> bool:
    found = os.path.realpath(os.fsdecode(path))
    return any(found == folder or found.startswith(folder + os.sep) for folder in folders)
