"""Images in a zip: EDM's dataset format, stored or deflated.

Nothing is ever extracted. The index is checked as a whole when the zip is opened, an image's
checksum when it is read.
"""

import hashlib
import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from fastgan.data.image_source import (
    INDEX_NAME,
    MAX_ENTRY_BYTES,
    ImageSource,
    is_image_name,
    too_large,
)
from fastgan.errors import UserError, shown

MAX_NAME_LENGTH = 500  # names go into messages
_ENCRYPTED = 0x1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ZipSource(ImageSource):
    """The images of a zip, through one handle per process: forked workers open their own."""

    kind = "zip"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: zipfile.ZipFile | None = None
        self._handle_pid = 0
        members = self._zip().infolist()
        _check_names(members, path)
        files = [info for info in members if not info.is_dir()]
        _check_members(files, path)
        super().__init__(path, [info.filename for info in files])

    def read(self, name: str, limit: int = MAX_ENTRY_BYTES) -> bytes:
        archive = self._zip()
        try:
            size = archive.getinfo(name).file_size
            if size <= limit:
                return archive.read(name)
        except Exception as error:  # zipfile and zlib raise nearly anything on broken bytes
            raise UserError(
                f"corrupt entry ({shown(error)}), {self.where(name)}, a complete zip expected"
            ) from error
        raise too_large(size, limit, self.where(name))

    def fingerprint(self) -> str:
        """sha256 over names, sizes and CRC-32s: the content, whichever way it is compressed."""
        digest = hashlib.sha256()
        for info in sorted(self._zip().infolist(), key=lambda info: info.filename):
            if is_image_name(info.filename) or info.filename == INDEX_NAME:
                line = f"{info.filename}\n{info.file_size} {info.CRC:08x}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        return "names+sizes+crc32:" + digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_handle_pid": 0}

    def _zip(self) -> zipfile.ZipFile:
        # A handle shared with the parent process would share its file position.
        if self._handle is None or self._handle_pid != os.getpid():
            try:
                self._handle = zipfile.ZipFile(self.path)
            except Exception as error:  # as in read
                raise UserError(
                    f"unreadable zip ({shown(error)}), {self.path}, a zip expected"
                ) from error
            self._handle_pid = os.getpid()
        return self._handle


def _check_names(members: list[zipfile.ZipInfo], path: Path) -> None:
    for position, name in enumerate(info.filename for info in members):
        if not 0 < len(name) <= MAX_NAME_LENGTH:
            raise UserError(
                f"name of {len(name)} characters, entry {position} of zip {path}, "
                f"1 to {MAX_NAME_LENGTH} expected"
            )


def _check_members(members: list[zipfile.ZipInfo], path: Path) -> None:
    seen: set[str] = set()
    for info in members:
        name, where = info.filename, f"entry {info.filename!r} of zip {path}"
        if not _is_inside(name):
            raise UserError(f"path leaves the archive, {where}, a relative path expected")
        if name in seen:
            raise UserError(f"duplicate name, {where}, one entry per name expected")
        seen.add(name)
        if info.flag_bits & _ENCRYPTED:
            raise UserError(f"encrypted, {where}, a zip without password expected")
        if info.compress_type not in _METHODS:
            raise UserError(
                f"compression method {info.compress_type}, {where}, stored or deflated expected"
            )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        return False
    return "\\" not in name and ":" not in path.parts[0]
