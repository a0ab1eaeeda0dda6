"""Hydra for a machine that has neither it nor a network: pure-Python wheels brought along.

`make gpu-wheels` fills the folder where there is a network; it travels with the repository.
"""

import importlib
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from fastgan.common.errors import UserError

NEEDED = ("hydra", "omegaconf", "antlr4")
# Together they unpack to less than 3 MB.
_LIMIT_BYTES = 64 * 2**20


@contextmanager
def hydra_importable(folder: Path) -> Iterator[Path | None]:
    """Inside, `import hydra` works: as installed (yields None), or from the wheels in `folder`
    unpacked to a temporary folder (yielded), since Hydra reads configurations of its own as files.

    UserError: neither is there, or a file in `folder` is no wheel one would unpack.
    """
    if not _missing():
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="wheels-") as name:
        for wheel in sorted(folder.glob("*.whl")):
            unpack(wheel, Path(name))
        sys.path.insert(0, name)
        importlib.invalidate_caches()
        try:
            if _missing():
                raise UserError(
                    f"{', '.join(_missing())} cannot be imported, on this machine or from "
                    f"{folder}/*.whl, `make gpu-wheels` where there is a network would fill it"
                )
            yield Path(name)
        finally:
            sys.path.remove(name)


def unpack(wheel: Path, target: Path) -> None:
    """Extracts a wheel. UserError: no wheel, too large, or a member that would leave `target`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                    raise UserError(
                        f"member {member.filename!r} leads outside, {wheel}, "
                        "a wheel that pip made would not"
                    )
            total = sum(member.file_size for member in archive.infolist())
            if total > _LIMIT_BYTES:
                raise UserError(
                    f"unpacks to {total} bytes, {wheel}, at most {_LIMIT_BYTES} are expected"
                )
            archive.extractall(target)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"cannot be unpacked ({error}), {wheel}, a wheel would do") from error


def _missing() -> list[str]:
    return [name for name in NEEDED if not _found(name)]


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
