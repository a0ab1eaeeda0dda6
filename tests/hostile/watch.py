"""What code runs, imports, writes, or reads outside one folder, by Python's audit events."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")
_RUNS += ("pty.spawn", "socket.", "ctypes.", "urllib.Request", "webbrowser.", "pickle.find_class")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
_CHANGES += ("os.link", "os.symlink", "shutil.rmtree", "shutil.move", "shutil.copyfile")
_OURS = {str(ROOT / name) for name in ("fastgan", "kernels", "configs")}
_LIBRARIES = tuple({sys.prefix, sys.base_prefix} | _OURS)
_watched: dict[str, Any] = {"folder": None, "seen": []}


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
    modules = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _watched["folder"] is None:
            return
        folder, _watched["folder"] = _watched["folder"], None  # what follows has events of its own
        try:
            if _is_wrong(event, arguments, folder, modules):
                _watched["seen"].append(f"{event} {str(arguments)[:200]!a}")
        finally:
            _watched["folder"] = folder

    sys.addaudithook(hook)


def _is_wrong(event: str, arguments: tuple[Any, ...], folder: str, modules: set[str]) -> bool:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int):
            return False
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        return not (_is_inside(path, (folder,)) or (not writes and _is_inside(path, _LIBRARIES)))
    if event == "import":
        return arguments[0].partition(".")[0] not in modules
    if event == "exec":
        return arguments[0].co_filename == "<string>"
    if event.startswith(_CHANGES):
        return not _is_inside(arguments[0], (folder,))
    return event.startswith(_RUNS)


def _is_inside(path: Any, folders: tuple[str, ...]) -> bool:
    found = os.path.realpath(os.fsdecode(path))
    return any(found == folder or found.startswith(folder + os.sep) for folder in folders)
