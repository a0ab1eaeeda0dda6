"""Calls in a process of their own, which may hang or die: a kernel that was never tried can."""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

# Importing PyTorch and the function's module, from a cold disk.
START_SECONDS = 300.0
# For a process to end by itself, and for a killed one whose GPU does not let go of it.
LEAVE_SECONDS = 5.0
BURY_SECONDS = 30.0


class Failed(Exception):
    """Why a call has no result, in one line."""


class Hung(Failed):
    """No result in the time allowed."""


class Child:
    """Calls `function` (top-level in its module) in a spawned process.

    The process ends with the first call that fails, by whatever cause, as what a broken kernel
    leaves behind is not to be trusted; the next call starts another. A context manager.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, *arguments: Any, timeout: float) -> Any:
        """function(*arguments). Failed if it raises or dies, Hung after `timeout` seconds."""
        if self._process is None:
            self._start()
        try:
            self._connection.send(arguments)
            return self._answer(timeout)
        except BaseException:
            self._end()
            raise

    def _start(self) -> None:
        """ValueError where not even an untouched process comes up: there is no point in another."""
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.function))
        self._process.start()
        theirs.close()
        try:
            self._answer(START_SECONDS)
        except Failed as why:
            self._end()
            raise ValueError(
                f"nothing can be measured any more, a new process {why}, what was measured is "
                "written, the same command would go on"
            ) from None

    def _answer(self, timeout: float) -> Any:
        if not self._connection.poll(timeout):
            raise Hung(f"hung: no answer in {timeout:g} s")
        try:
            well, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(BURY_SECONDS)
            raise Failed(f"crashed: exit status {self._process.exitcode}") from None
        if not well:
            raise Failed(value)
        return value

    def _end(self) -> None:
        if self._process is None:
            return
        self._connection.close()
        self._process.join(LEAVE_SECONDS)
        self._process.kill()
        self._process.join(BURY_SECONDS)
        self._process = self._connection = None


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    """The child: says that it is there, then answers calls until one fails."""
    connection.send((True, None))
    well = True
    while well:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, _one_line(error)
        connection.send(answer)
        well = answer[0]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    # Triton quotes the kernel in between.
    shown = f"{lines[0]} ... {lines[-1]}" if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {shown}"
