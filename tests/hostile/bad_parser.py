"""A parser that does whatever the file says: the harness has to notice every one of these."""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from fastgan.common.errors import UserError
from tests.hostile.harness import Case, Suite


def _spin(_: Path) -> None:
    while True:
        try:
            while True:
                pass
        except Exception:
            pass


def _swallow(path: Path) -> None:
    try:
        bytearray(8 << 30)
    except MemoryError as error:
        raise UserError(f"damaged, {path}, a whole file expected") from error


def _refuse(message: str) -> Callable[[Path], None]:
    def refuse(path: Path) -> None:
        error = UserError("")
        error.args = (message.format(path=path),)
        raise error

    return refuse


def _follow(path: Path) -> None:
    path.with_name("link").symlink_to("/etc/hostname")
    path.with_name("link").open().close()


# What it does, and what the harness says.
MISDEEDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "raises": (lambda path: [][0], "IndexError"),
    "raises ValueError": (lambda path: int("x"), "ValueError"),
    "exits": (lambda path: sys.exit(1), "SystemExit"),
    "recurses": (lambda path: MISDEEDS["recurses"][0](path), "RecursionError"),
    "two lines": (_refuse("a\nb {path}"), "more than one printable line"),
    "escapes": (_refuse("a\x1b[31m {path}"), "more than one printable line"),
    "a long line": (_refuse("x" * 2000 + " {path}"), "a line of 20"),
    "no name": (_refuse("damaged, a whole file expected"), "is not named"),
    "spins": (_spin, "TooSlow"),
    "takes memory": (lambda path: b"x" * (400 << 20), "MiB; "),
    "reserves memory": (lambda path: bytearray(8 << 30), "MemoryError"),
    "hides a lack of memory": (_swallow, "memory was asked for"),
    "warns": (lambda path: warnings.warn("x", stacklevel=1), "warned: x"),
    "runs a program": (lambda path: subprocess.run(["true"]), "subprocess.Popen"),
    "runs a shell": (lambda path: os.system("true"), "os.system"),
    "executes text": (lambda path: exec("1"), "exec"),
    "imports": (lambda path: __import__("absent_module"), "import"),
    "reads elsewhere": (lambda path: open("/etc/hostname").close(), "open"),
    "follows a link": (_follow, "open"),
    "writes beside": (lambda path: path.with_name("x").write_text("x"), "left other files"),
    "writes elsewhere": (lambda path: Path("/dev/null").write_text("x"), "open"),
    "removes": (lambda path: path.unlink(), "left other files"),
    "changes": (lambda path: path.write_text("x"), "left other files"),
    "accepts": (lambda path: None, "valid where refused was expected"),
    "refuses": (_refuse("damaged {path}"), "refused where valid was expected"),
    "waits": (lambda path: time.sleep(0.01), ""),
}


def cases() -> list[Case]:
    expected = {"accepts": "refused", "refuses": "valid", "waits": "valid"}
    return [Case("misdeed", name, name.encode(), expected.get(name)) for name in MISDEEDS]  # type: ignore[arg-type]


def read(path: Path) -> None:
    MISDEEDS[path.read_text()][0](path)


SUITE = Suite("bad parser", "bad.bin", cases, read)
