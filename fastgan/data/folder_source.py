"""Images in a folder: EDM's layout unpacked, class folders, or simply images."""

import hashlib
import os
from pathlib import Path

from fastgan.data.image_source import INDEX_NAME, MAX_ENTRY_BYTES, ImageSource, too_large
from fastgan.data.labels import has_class_folders, labels_from_folders
from fastgan.errors import UserError


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
        if len(data) > limit:
            raise too_large(len(data), limit, self.where(name))
        return data

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
        for entry in _scan(root / folder):
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


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"cannot list ({error.strerror}), folder {folder}, a readable folder expected"
        ) from error


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
