"""One archive of a report's folder, in pieces that any transfer takes."""

import tarfile
from pathlib import Path

from benchmarks.gpu_report.runner import CACHES
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically

PIECE_BYTES = 15 * 2**20


def pack(folder: Path, archive: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Writes `folder` as NAME.tar.gz; returns its file, or NAME.tar.gz.00, .01 ... of at most
    `piece_bytes` each, which `cat` joins. UserError: as `check` says."""
    check(folder, archive)
    with replace_atomically(archive) as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(folder, folder.name, filter=lambda info: None if _aside(info.name) else info)
    for piece in archive.parent.glob(f"{archive.name}.[0-9][0-9]"):
        piece.unlink()
    if archive.stat().st_size <= piece_bytes:
        return [archive]
    pieces: list[Path] = []
    with archive.open("rb") as source:
        while content := source.read(piece_bytes):
            pieces.append(archive.with_name(f"{archive.name}.{len(pieces):02}"))
            pieces[-1].write_bytes(content)
    archive.unlink()
    return pieces


def check(folder: Path, archive: Path) -> None:
    """UserError: no name of an archive, no place for one, or not writable."""
    if not archive.name.endswith(".tar.gz"):
        raise UserError(f"no name of an archive, --pack {archive}, NAME.tar.gz would do")
    if archive.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"is inside {folder}, --pack {archive}, a file beside it would do")
    if not archive.resolve().parent.is_dir():
        raise UserError(f"no folder {archive.parent}, --pack {archive}, an existing one would do")


def _aside(name: str) -> bool:
    """Whether a file is half-written, or a cache."""
    path = Path(name)
    return path.name.startswith(".") or CACHES in path.parts
