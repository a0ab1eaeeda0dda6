"""Files we read and write: presence, identity (sha256), atomic replacement."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fastgan.errors import UserError


def require_file(path: str | os.PathLike[str], purpose: str) -> Path:
    """`path`, if it is a file; otherwise a UserError that says what it was wanted for."""
    found = Path(path)
    if not found.is_file():
        raise UserError(f"no such file, {found}, give the path of {purpose}")
    return found


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replace_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place when the block ends well, and vanishes otherwise.

    UserError: `path` is a folder, or its folder cannot be made or written to.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"is a folder, {target}, give the path of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise UserError(
            f"cannot write ({error.strerror}), {target}, give a path in a writable folder"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, target)
    except BaseException:
        os.unlink(aside)
        raise


def _umask() -> int:
    """The process's umask: mkstemp files are private, results should not be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
