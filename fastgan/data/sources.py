"""Folders and zips of encoded images, and either as a dataset of one size and mode.

A source is a stranger's: no link or path leads outside, sizes are checked before bytes are read,
and everything that does not fit is a UserError naming the entry.
"""

import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np

from fastgan.common.errors import UserError, shown
from fastgan.common.files import parse_object
from fastgan.data.decode import EXTENSIONS, check_header, dataset_shape, decode_image, open_image
from fastgan.data.labels import (
    has_class_folders,
    labels_from_folders,
    labels_from_index,
)

INDEX_NAME = "dataset.json"
MAX_ENTRY_BYTES = 1 << 26
_MAX_INDEX_BYTES = 512 << 20
# A few kilobytes of JSON grow to many times that as Python objects, so the bound follows n.
_MAX_INDEX_BYTES_PER_IMAGE = 64 << 10
MAX_NAME_LENGTH = 500  # names go into messages
_ENCRYPTED = 0x1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Images whose header is checked on opening; the others are checked when they are read.
_HEADER_CHECKS = 512
# Keys of dataset.json that a number's provenance repeats.
_RECORDED = ("resampling", "source")


class ImageSource(ABC):
    """Named encoded images in sorted order, of any size and mode, with labels.

    `names` uses forward slashes and is never empty; `labels` is int64 [n], float32 [n, label_dim]
    or None; `metadata` holds the texts under the other keys of dataset.json.
    """

    kind: str

    def __init__(self, path: Path, entries: list[str]) -> None:
        self.path = path
        self.names = sorted(name for name in entries if is_image_name(name))
        if not self.names:
            raise UserError(
                f"no images, {self.kind} {path}, files ending in {' '.join(EXTENSIONS)} expected"
            )
        self.labels: np.ndarray | None = None
        self.metadata: dict[str, str] = {}
        if INDEX_NAME in entries:
            self._read_index()
            return
        # An archive with one folder too many would silently lose its labels.
        for name in entries:
            if PurePosixPath(name).name == INDEX_NAME:
                raise UserError(
                    f"labels in {name!r}, {self.kind} {path}, {INDEX_NAME} at the root expected"
                )

    @abstractmethod
    def read(self, name: str, limit: int = MAX_ENTRY_BYTES) -> bytes:
        """The entry's bytes. UserError when there are more than `limit` or it cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the contents that costs no reading of images; see the sub-classes."""

    def where(self, name: str) -> str:
        """How messages name an entry."""
        return f"entry {name!r} of {self.kind} {self.path}"

    def _refuse(self, name: str, size: int, limit: int) -> NoReturn:
        raise UserError(f"{size} bytes, {self.where(name)}, at most {limit} expected")

    def _read_index(self) -> None:
        limit = min(_MAX_INDEX_BYTES, (1 << 20) + _MAX_INDEX_BYTES_PER_IMAGE * len(self.names))
        where = self.where(INDEX_NAME)
        content = self.read(INDEX_NAME, limit)
        try:
            index = parse_object(content)
        except ValueError as error:
            raise UserError(f"{error}, {where}, an object expected") from error
        if "labels" not in index:
            raise UserError(f"no key 'labels', {where}, a list of [name, label] or null expected")
        self.labels = labels_from_index(index.pop("labels"), self.names, where)
        self.metadata = {key: shown(v, 200) for key, v in index.items() if isinstance(v, str)}


def is_image_name(name: str) -> bool:
    """Whether the loader takes this entry for an image: by extension, hidden files left out."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in EXTENSIONS and not hidden


class FolderSource(ImageSource):
    """The images below a folder; without a dataset.json, class folders give the labels."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        super().__init__(path, _files_below(path))
        if not (path / INDEX_NAME).exists() and has_class_folders(self.names):
            self.labels = labels_from_folders(self.names, f"folder {path}")

    def read(self, name: str, limit: int = MAX_ENTRY_BYTES) -> bytes:
        try:
            with open(self.path / name, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise UserError(
                f"cannot read ({error.strerror}), {self.where(name)}, a readable file expected"
            ) from error
        return data if len(data) <= limit else self._refuse(name, len(data), limit)

    def fingerprint(self) -> str:
        """sha256 over names and sizes: unlike a zip's it cannot tell equally long images apart."""
        digest = hashlib.sha256()
        for name in self.names:
            line = f"{name}\n{os.stat(self.path / name).st_size}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return "names+sizes:" + digest.hexdigest()


def _files_below(root: Path) -> list[str]:
    """Relative paths of all regular files, hidden ones left out; refuses links that lead out."""
    found: list[str] = []
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            raise UserError(
                f"cannot list ({error.strerror}), folder {root / folder}, "
                "a readable folder expected"
            ) from error
        for entry in entries:
            name = folder + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                _check_link(root, name)
            if entry.is_dir():
                pending.append(name + "/")
            elif entry.is_file():
                found.append(name)
    return found


def _check_link(root: Path, name: str) -> None:
    where = f"link {name!r} of folder {root}"
    try:
        target = (root / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"broken link, {where}, a file or folder expected") from error
    if not target.is_relative_to(root.resolve()):
        raise UserError(f"link leaves the folder, {where}, a target inside expected")
    # Images behind it would count twice, and a link to a parent would never end.
    if target.is_dir():
        raise UserError(f"link to a folder, {where}, a real folder expected")


class ZipSource(ImageSource):
    """The images of a zip, through one handle per process: forked workers open their own."""

    kind = "zip"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: zipfile.ZipFile | None = None
        self._handle_pid = 0
        members = self._zip().infolist()
        seen: set[str] = set()
        for position, info in enumerate(members):
            _check_member(info, position, seen, path)
        super().__init__(path, [info.filename for info in members if not info.is_dir()])

    def read(self, name: str, limit: int = MAX_ENTRY_BYTES) -> bytes:
        archive = self._zip()
        try:
            info = archive.getinfo(name)
            # What zipfile reads at once, however few bytes there are, is the packed size.
            size = max(info.file_size, info.compress_size)
            if size <= limit:
                return archive.read(name)
        except Exception as error:  # zipfile and zlib raise nearly anything on broken bytes
            raise UserError(
                f"corrupt entry ({shown(error)}), {self.where(name)}, a complete zip expected"
            ) from error
        return self._refuse(name, size, limit)

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


def _check_member(info: zipfile.ZipInfo, position: int, seen: set[str], path: Path) -> None:
    """UserError for an entry that no dataset has; names of files are added to those `seen`."""
    name = info.filename
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        raise UserError(
            f"name of {len(name)} characters, entry {position} of zip {path}, "
            f"1 to {MAX_NAME_LENGTH} expected"
        )
    if info.is_dir():
        return
    where = f"entry {name!r} of zip {path}"
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


class SourceDataset:
    """The images of a zip or folder (an ImageDataset).

    Opening checks the index and the headers of up to 512 images spread evenly; each image is
    checked in full whenever it is read. Both raise UserError naming the entry.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.name = source.path.name
        self.labels = source.labels
        self.label_dim = 0
        if self.labels is not None:
            self.label_dim = (
                int(self.labels.max()) + 1 if self.labels.ndim == 1 else self.labels.shape[1]
            )
        self.resolution, self.channels = shape_from(source, source.names[0])
        self._check_headers()

    def __len__(self) -> int:
        return len(self._source.names)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [k, channels, resolution, resolution] of the images at int [k] `indices`."""
        shape = (len(indices), self.channels, self.resolution, self.resolution)
        batch = np.empty(shape, np.uint8)
        for row, index in enumerate(indices):
            name = self._source.names[index]
            batch[row] = read_image(self._source, name, self.resolution, self.channels)
        return batch

    def provenance(self) -> dict[str, Any]:
        """Name, size, recorded resampling, and a fingerprint of the contents."""
        metadata = self._source.metadata
        return {
            "dataset": self.name,
            "n": len(self),
            "resolution": self.resolution,
            "channels": self.channels,
            "resampling": "not recorded",
            **{key: metadata[key] for key in _RECORDED if key in metadata},
            "fingerprint": self._source.fingerprint(),
        }

    def _check_headers(self) -> None:
        count = min(len(self), _HEADER_CHECKS)
        for index in np.linspace(0, len(self) - 1, count).astype(int):
            name = self._source.names[index]
            where = self._source.where(name)
            data = self._source.read(name, entry_limit(self.resolution, self.channels))
            check_header(open_image(data, where), where, self.resolution, self.channels)


def open_source(path: str | Path) -> ImageSource:
    """The encoded images of a zip or a folder, not yet held to one size and mode."""
    path = Path(path)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        return ZipSource(path)
    raise UserError(f"no dataset at {path}, a zip, a folder of images or 'digits' expected")


def shape_from(source: ImageSource, name: str) -> tuple[int, int]:
    """(resolution, channels) that the entry `name` would set as a dataset's first image."""
    where = source.where(name)
    return dataset_shape(open_image(source.read(name), where), where)


def read_image(source: ImageSource, name: str, resolution: int, channels: int) -> np.ndarray:
    """uint8 [channels, resolution, resolution] of the entry `name`."""
    data = source.read(name, entry_limit(resolution, channels))
    return decode_image(data, source.where(name), resolution, channels)


def entry_limit(resolution: int, channels: int) -> int:
    """Bytes that an image of this size may take: its pixels several times over, plus metadata."""
    return min((1 << 20) + 8 * channels * resolution**2, MAX_ENTRY_BYTES)
