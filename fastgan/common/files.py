"""Files we read and write: presence, identity (sha256), atomic replacement, bounded JSON."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastgan.common.errors import UserError, shown

# How names end of what is not whole yet; they begin with a dot.
PART = ".part"
MAX_LEVELS = 100


def require_file(path: str | os.PathLike[str], purpose: str) -> Path:
    """`path`, if it is a file; otherwise a UserError that says what it was wanted for."""
    found = Path(path)
    try:
        there = found.is_file()
    except OSError:  # a name that is too long
        there = False
    if not there:
        raise UserError(f"no such file, {found}, give the path of {purpose}")
    return found


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """A file's content. OSError, or ValueError where it has more than `most` bytes."""
    if not os.path.isfile(path):  # a pipe would keep us waiting
        raise FileNotFoundError(f"{os.path.basename(path)} is no file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes in {os.path.basename(path)}")
    return content


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replace_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place when the block ends well, and vanishes otherwise.

    UserError: `path` is a folder, or its folder cannot be made or written to.
    """
    with replacement(path) as aside, aside.open("wb") as file:
        yield file


@contextmanager
def replacement(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for what writes to a path: an empty file to be overwritten."""
    target = Path(path)
    try:
        if target.is_dir():
            raise UserError(f"is a folder, {target}, give the path of a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PART}")
        aside.touch(exist_ok=False)
        mode = aside.stat().st_mode
    except OSError as error:
        raise UserError(
            f"cannot write ({error.strerror}), {target}, give a path in a writable folder"
        ) from error
    try:
        yield aside
        aside.chmod(mode)  # whoever overwrote it may have made a private file of it
        os.replace(aside, target)
    except BaseException:
        os.unlink(aside)
        raise


def sweep(folder: Path) -> None:
    """Removes what processes that were killed while they wrote into `folder` left there."""
    for path in folder.glob(f".*{PART}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object that `text` holds; ValueError, whose text says why, for anything else.

    An object of more than MAX_LEVELS is refused: one that can just be read could not be written
    again as part of another one.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed JSON: {shown(error)}") from error
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    layer: list[Any] = [value]
    for _ in range(MAX_LEVELS):
        nested = [v for v in layer if isinstance(v, dict | list)]
        layer = [child for v in nested for child in (v.values() if isinstance(v, dict) else v)]
    if layer:
        raise ValueError(f"more than {MAX_LEVELS} levels of JSON")
    return value
