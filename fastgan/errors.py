"""What a user did wrong, said in one line, and how a command ends.

Every message reads `WHAT, WHERE, WHAT WOULD BE RIGHT`; commands print it as `error: ...` and exit
with status 1. Anything that is not a UserError is a defect of ours and keeps its traceback.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A mistake in what the user gave us (file, option, data), explained in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ArgumentParser(argparse.ArgumentParser):
    """argparse with this project's form of errors: one line, exit status 1 (argparse's is 2)."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}, see {self.prog} -h")


def fail(message: str) -> NoReturn:
    """Prints `error: MESSAGE` on stderr and exits with status 1."""
    print(f"error: {message}", file=sys.stderr)
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
