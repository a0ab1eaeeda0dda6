"""Which system calls of a process change a folder, and a kill -9 at any one of them, by ptrace.

Works without a compiler or strace: on Linux from 5.3 on (PTRACE_GET_SYSCALL_INFO), x86-64 or ARM64,
for every thread of a forked child. See ptrace(2).
"""

import ctypes
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

# name: number on x86-64, on ARM64 (None where it does not exist), where the arguments hold paths.
_TABLE = {
    "open": (2, None, "path"),
    "openat": (257, 56, "at"),
    "creat": (85, None, "path"),
    "write": (1, 64, "fd"),
    "pwrite64": (18, 68, "fd"),
    "writev": (20, 66, "fd"),
    "pwritev": (296, 70, "fd"),
    "sendfile": (40, 71, "fd"),
    "truncate": (76, 45, "path"),
    "ftruncate": (77, 46, "fd"),
    "fallocate": (285, 47, "fd"),
    "fsync": (74, 82, "fd"),
    "fdatasync": (75, 83, "fd"),
    "rename": (82, None, "path path"),
    "renameat": (264, 38, "at at"),
    "renameat2": (316, 276, "at at"),
    "link": (86, None, "path path"),
    "linkat": (265, 37, "at at"),
    "unlink": (87, None, "path"),
    "unlinkat": (263, 35, "at"),
    "mkdir": (83, None, "path"),
    "mkdirat": (258, 34, "at"),
    "rmdir": (84, None, "path"),
    "chmod": (90, None, "path"),
    "fchmod": (91, 52, "fd"),
    "fchmodat": (268, 53, "at"),
}
_MACHINES = ("x86_64", "aarch64")
_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_TRACESYSGOOD, _TRACECLONE, _EXITKILL, _WALL = 1, 8, 0x100000, 0x40000000
_ENTRY, _EXIT = 1, 2
_REFUSED = 98
_MAKING = os.O_CREAT | os.O_TRUNC
# What tempfile and safetensors draw at random in the names of their files.
_RANDOM = re.compile(r"(?<=\.)[a-z0-9_]{8}(?=\.part\b)|(?<=/\.tmp)\w{6}\b")


@dataclass(frozen=True)
class Call:
    """A system call that changes a folder, as it begins; paths in it, what is random in them *."""

    name: str
    paths: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {' -> '.join(self.paths)}"


@dataclass
class Traced:
    """What a child did to the folder until it ended."""

    calls: list[Call] = field(default_factory=list)
    trees: list[dict[str, int]] = field(default_factory=list)
    """The folder (see `tree`) at the beginning of each call, where nothing is killed."""
    unlisted: list[int] = field(default_factory=list)
    """Numbers of other system calls during which the folder changed."""
    status: int = 0
    """Its exit status, or minus the signal that ended it."""


class _Info(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("pointers", ctypes.c_uint64 * 2),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("more", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def run_traced(action: Callable[[], object], folder: Path, kill: "Kill | None" = None) -> Traced:
    """Runs `action` in a child (forked: call it in a process without other threads or children).

    Without `kill` the folder is looked at after every system call, whatever it is.
    """
    child = os.fork()
    if child == 0:
        _be_traced(action)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        raise RuntimeError(
            "ptrace is refused, on this machine, kernel.yama.ptrace_scope below 3 and a container "
            "with ptrace in its seccomp profile would be right"
        )
    _ptrace(_SETOPTIONS, child, 0, _TRACESYSGOOD | _TRACECLONE | _EXITKILL)
    _ptrace(_SYSCALL, child, 0, 0)
    return _Tracer(child, folder.resolve(), kill).follow()


@dataclass(frozen=True)
class Kill:
    """SIGKILL as call number `at` begins, or `torn`: when half of what it writes is in the file."""

    at: int
    torn: bool = False


def tree(folder: Path) -> dict[str, int]:
    """Names below `folder`, what is random in them *, and sizes (-1 for folders)."""
    found = {}
    for path in folder.rglob("*"):
        name = _RANDOM.sub("*", f"/{path.relative_to(folder)}")[1:]
        found[name] = path.stat().st_size if path.is_file() else -1
    return found


def in_child(action: Callable[[], object]) -> None:
    """Runs `action` in a forked process, undisturbed."""
    child = os.fork()
    if child == 0:
        _run(action)
    assert os.waitpid(child, 0)[1] == 0, "failed in a child"


def _be_traced(action: Callable[[], object]) -> NoReturn:
    if _libc.ptrace(_TRACEME, 0, None, None):
        os._exit(_REFUSED)
    os.kill(os.getpid(), signal.SIGSTOP)
    _run(action)


def _run(action: Callable[[], object]) -> NoReturn:
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


class _Tracer:
    """Goes from stop to stop of any thread of a child until the child is gone."""

    def __init__(self, child: int, folder: Path, kill: Kill | None) -> None:
        self.child, self.folder, self.kill = child, folder, kill
        self.found = Traced()
        self.under_way: dict[int, tuple[int, Call | None]] = {}
        self.tearing: tuple[Path, bytes] | None = None
        self.last = None if kill else _state(folder)

    def follow(self) -> Traced:
        while True:
            thread, status = os.waitpid(-1, _WALL)
            if not os.WIFSTOPPED(status):
                if thread != self.child:
                    continue
                self.found.status = os.waitstatus_to_exitcode(status)
                return self.found
            number = os.WSTOPSIG(status)
            if number == signal.SIGTRAP | 0x80:
                self._at_call(thread)
                number = 0
            elif number in (signal.SIGTRAP, signal.SIGSTOP):  # a new thread's
                number = 0
            _ptrace(_SYSCALL, thread, 0, number)

    def _at_call(self, thread: int) -> None:
        info = _Info()
        _ptrace(_GET_SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == _ENTRY:
            call, paths = _call(thread, info, self.folder)
            self.under_way[thread] = info.number, call
            if call is not None:
                self._begins(call, paths)
        elif info.op == _EXIT and thread in self.under_way:
            self._ends(*self.under_way.pop(thread))

    def _begins(self, call: Call, paths: list[Path]) -> None:
        found, kill = self.found, self.kill
        found.calls.append(call)
        if kill is None:
            found.trees.append(tree(self.folder))
        elif len(found.calls) == kill.at + 1 and kill.torn:
            self.tearing = paths[0], paths[0].read_bytes()
        elif len(found.calls) == kill.at + 1:
            os.kill(self.child, signal.SIGKILL)

    def _ends(self, number: int, call: Call | None) -> None:
        if self.tearing and call is not None:
            os.kill(self.child, signal.SIGKILL)
            _tear(*self.tearing)
            self.tearing = None
        if self.last is None:
            return
        now = _state(self.folder)
        listed = [call, *(other for _, other in self.under_way.values())]
        if now != self.last and not any(listed):
            self.found.unlisted.append(number)
        self.last = now


def _call(thread: int, info: _Info, folder: Path) -> tuple[Call | None, list[Path]]:
    """The call that begins, if it is one of the table's on something in `folder`."""
    name, where = _BY_NUMBER.get(info.number, ("", ""))
    paths, rest = [], list(info.arguments)
    for kind in where.split():
        if kind == "path":
            paths.append(_resolved(thread, f"/proc/{thread}/cwd", rest.pop(0)))
        elif kind == "at":
            base = ctypes.c_int32(rest.pop(0) & 0xFFFFFFFF).value
            start = f"/proc/{thread}/cwd" if base == -100 else f"/proc/{thread}/fd/{base}"
            paths.append(_resolved(thread, start, rest.pop(0)))
        else:
            paths.append(Path(os.readlink(f"/proc/{thread}/fd/{rest.pop(0)}")))
    if not any(path.is_relative_to(folder) for path in paths):
        return None, paths
    if name.startswith("open") and not rest[0] & _MAKING:
        return None, paths
    inside = (f"/{path.relative_to(folder)}" for path in paths)
    return Call(name, tuple(_RANDOM.sub("*", path)[1:] for path in inside)), paths


def _resolved(thread: int, start: str, address: int) -> Path:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        text = os.pread(memory.fileno(), 4096, address).partition(b"\0")[0]
    return Path(os.readlink(start), os.fsdecode(text))


def _state(folder: Path) -> list[tuple[object, ...]]:
    """What changes with every change of the folder's files, but not their content in memory."""
    paths = [folder, *sorted(folder.rglob("*"))]
    stats = [(path, os.lstat(path)) for path in paths]
    return [(p, s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats]


def _tear(path: Path, before: bytes) -> None:
    """Leaves the first half of what was written."""
    after = path.read_bytes()
    begin = next(i for i in range(len(after)) if after[i : i + 1] != before[i : i + 1])
    middle = (begin + len(after)) // 2
    path.write_bytes(after[:middle] + before[middle:])


def _ptrace(request: int, thread: int, address: int, data: int) -> None:
    if _libc.ptrace(request, thread, address, data) == -1:
        error = ctypes.get_errno()
        if error != 3:  # ESRCH: killed in the meantime
            raise OSError(error, f"ptrace request {request:#x}: {os.strerror(error)}")


_MACHINE = _MACHINES.index(platform.machine())
_BY_NUMBER = {row[_MACHINE]: (name, row[2]) for name, row in _TABLE.items()}
