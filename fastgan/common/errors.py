"""What a user did wrong, said in one line, and how a command ends.

Every message reads `WHAT, WHERE, WHAT WOULD BE RIGHT`; commands print it as `error: ...` and exit
with status 1. Anything that is not a UserError is a defect of ours and keeps its traceback.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

_MOST = 1200  # characters of a message


class UserError(ValueError):
    """A mistake in what the user gave us (file, option, data), explained in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """The message without line breaks, with control characters escaped; the middle of a long one
    is left out."""
    text = " ".join(message.split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= _MOST else f"{text[: _MOST - 300]} ... {text[-290:]}"


def shown(value: object, limit: int = 100) -> str:
    """What a stranger's file holds, or an error about it: one short printable line for a message.

    Of an error the first line; of anything but texts and numbers the type, since the text of nested
    containers can be made endless.
    """
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge integer"  # whose digits Python may refuse to compute
    if not isinstance(value, str | int | float | Exception):
        return f"a {type(value).__name__}"
    lines = str(value).splitlines() or [""]
    text = lines[0] if lines[0].isprintable() else ascii(lines[0])[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."


class ArgumentParser(argparse.ArgumentParser):
    """argparse with this project's form of errors: one line, exit status 1 (argparse's is 2)."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}, see {self.prog} -h")


def out_of_memory(error: BaseException) -> bool:
    """Whether it, or what it arose from, is PyTorch's OutOfMemoryError, or of a library beside it,
    which says so."""
    said = ("out of memory", "ALLOC_FAILED")
    return any(
        type(each).__name__ == "OutOfMemoryError" or any(words in str(each) for words in said)
        for each in origins(error)
    )


def origins(error: BaseException) -> list[BaseException]:
    """The error and what it arose from, the first cause last: what ends a recording that broke off
    is an error of its own."""
    found = [error]
    while (before := found[-1].__cause__ or found[-1].__context__) and before not in found:
        found.append(before)
    return found


def fail(message: str) -> NoReturn:
    """Prints `error: MESSAGE` on stderr and exits with status 1."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(1)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's `main`; a UserError becomes one line on stderr and exit status 1."""
    try:
        status = main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted")
    raise SystemExit(status or 0)
