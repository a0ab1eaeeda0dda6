"""Where encoded images come from: the named entries of a zip or of a folder, and their labels."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from fastgan.data.decode import EXTENSIONS
from fastgan.data.labels import labels_from_index, parse_index
from fastgan.errors import UserError, shown

INDEX_NAME = "dataset.json"
MAX_ENTRY_BYTES = 1 << 26
MAX_ENTRIES = 1 << 24
_MAX_INDEX_BYTES = 512 << 20
# A few kilobytes of JSON grow to many times that as Python objects, so the bound follows n.
_MAX_INDEX_BYTES_PER_IMAGE = 64 << 10


class ImageSource(ABC):
    """Named encoded images in sorted order, of any size and mode, with labels.

    `names` uses forward slashes and is never empty; `labels` is int64 [n], float32 [n, label_dim]
    or None; `metadata` holds the texts under the other keys of dataset.json.
    """

    kind: str

    def __init__(self, path: Path, entries: Iterable[str]) -> None:
        entries = list(entries)
        if len(entries) > MAX_ENTRIES:
            raise UserError(f"{len(entries)} entries, {path}, at most {MAX_ENTRIES} expected")
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
        else:
            _refuse_misplaced_index(entries, f"{self.kind} {path}")

    @abstractmethod
    def read(self, name: str, limit: int = MAX_ENTRY_BYTES) -> bytes:
        """The entry's bytes. UserError when there are more than `limit` or it cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the contents that costs no reading of images; see the sub-classes."""

    def where(self, name: str) -> str:
        """How messages name an entry."""
        return f"entry {name!r} of {self.kind} {self.path}"

    def _read_index(self) -> None:
        limit = min(_MAX_INDEX_BYTES, (1 << 20) + _MAX_INDEX_BYTES_PER_IMAGE * len(self.names))
        where = self.where(INDEX_NAME)
        index = parse_index(self.read(INDEX_NAME, limit), where)
        self.labels = labels_from_index(index.pop("labels"), self.names, where)
        self.metadata = {key: shown(v, 200) for key, v in index.items() if isinstance(v, str)}


def is_image_name(name: str) -> bool:
    """Whether the loader takes this entry for an image: by extension, hidden files left out."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in EXTENSIONS and not hidden


def too_large(size: int, limit: int, where: str) -> UserError:
    return UserError(f"{size} bytes, {where}, at most {limit} expected")


def _refuse_misplaced_index(entries: list[str], where: str) -> None:
    """Without this, an archive with one folder too many would silently lose its labels."""
    for name in entries:
        if PurePosixPath(name).name == INDEX_NAME:
            raise UserError(f"labels in {name!r}, {where}, {INDEX_NAME} at the root expected")
