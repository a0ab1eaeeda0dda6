"""From a checkpoint to a folder that can be published."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgan.checkpoint.network_file import NetworkFile, load_network_file
from fastgan.common.errors import UserError, shown
from fastgan.common.files import PART, file_sha256, parse_object, require_file, sync
from fastgan.export.card import (
    CPU,
    UNSPECIFIED,
    Card,
    difference,
    draw,
    is_generator,
    write_grid,
)
from fastgan.export.program import (
    DTYPES,
    MIB,
    check_program,
    require_size,
    write_program,
    write_rounded,
)
from fastgan.launch import build
from fastgan.launch.engine import select_kernels
from fastgan.models import Precond

_MOST_IMAGES = 10_000


@dataclass(frozen=True)
class Options:
    """What the user of tools/export.py may choose; `name` None: the folder's."""

    dtype: str = "bf16"
    name: str | None = None
    metrics: tuple[str, ...] = ()
    max_mib: float | None = None
    note: str | None = None
    program: bool = False
    images: int = 64
    license: str | None = None


def export(checkpoint: str, out: str | Path, options: Options) -> dict[str, Any]:
    """Writes the folder `out` with the network of `checkpoint`, a grid, a card, and a program.

    `checkpoint` is what fastgan.sample takes. The folder appears when it is complete. Returns what
    there is to say. UserError: wrong options, an `out` that exists, files that are no network or
    no result of this network, a size above `max_mib`.
    """
    assert options.dtype in DTYPES, options.dtype
    out = Path(out)
    name = options.name if options.name is not None else out.name
    _check_options(name, options)
    if os.path.lexists(out):
        raise UserError(f"{out} exists, a new folder would be right")
    select_kernels("auto", CPU)
    original, path = build.saved_network(checkpoint, CPU)
    source = load_network_file(path)
    _check_network(original, source, options)
    numbers = [read_result(file, source) for file in options.metrics]
    with new_folder(out) as folder:
        weights = folder / f"{name}.safetensors"
        file = write_rounded(source, original, weights, options.dtype, options.license)
        values = sum(parameter.numel() for parameter in original.parameters())
        require_size(file, values, options.dtype, options.max_mib)
        # As the file holds it.
        network, _ = build.saved_network(str(weights), CPU)
        images = draw(network, options.images)
        rounding = difference(draw(original, options.images), images)
        write_grid(network, folder / "grid.png")
        program = None
        if options.program:
            about = {"license": file.metadata["license"], "network_sha256": file.sha256}
            write_program(network, folder / f"{name}.pt2", about)
            program = check_program(folder / f"{name}.pt2", network, images)
        digests = {each.name: file_sha256(each) for each in sorted(folder.iterdir())}
        mib = weights.stat().st_size / MIB
        card = Card(
            name=name,
            network=network,
            file=file,
            source=source,
            dtype=options.dtype,
            rounding=rounding,
            numbers=numbers,
            program=program,
            note=options.note,
            sha256=digests,
        )
        (folder / "README.md").write_text(card.markdown(), encoding="utf-8")
    return {
        "out": str(out),
        "mib": round(mib, 2),
        "sha256": digests,
        "rounding": rounding,
        "program": program,
    }


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well, and vanishes otherwise.

    UserError: nothing can be written there.
    """
    aside = out.with_name(f".{out.name}.{os.getpid()}{PART}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.iterdir(), aside):
            sync(path)
        os.rename(aside, out)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write ({error.strerror}), {out}, a writable place with free space expected"
            ) from error
        raise


def _check_options(name: str, options: Options) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(
            f"name {name!a}, --name, at most 100 letters, digits, dots, - and _ would be right"
        )
    if not 1 <= options.images <= _MOST_IMAGES:
        raise UserError(f"--images {options.images}, 1 to {_MOST_IMAGES} would be right")
    if options.max_mib is not None and not options.max_mib > 0:
        raise UserError(f"--max-mib {options.max_mib}, a number above 0 would be right")


def _check_network(network: Precond, source: NetworkFile, options: Options) -> None:
    """UserError where there are no pictures, no program or another licence to be had of it."""
    channels, said = network.model.img_channels, source.metadata["license"]
    if channels not in (1, 3):
        raise UserError(f"images of {channels} channels, {source.path}, 1 or 3 would be right")
    if options.program and not is_generator(network):
        raise UserError(
            f"--program with an EDM denoiser, {source.path}, whose sampler would be 35 networks in "
            "one program: a one-step generator would be right"
        )
    if options.license is not None and said != UNSPECIFIED:
        raise UserError(
            f"--license {options.license}, {source.path}, which is under {shown(said)!a}: "
            "that licence stays, no --license would be right"
        )


_MAX_BYTES = 1 << 20
_KEYS: dict[str, type | tuple[type, ...]] = {
    "metric": str,
    "value": (int, float),
    "n": int,
    "seeds": str,
    "sampler": dict,
    "extractor": dict,
    "reference": dict,
    "checkpoint": dict,
}


def read_result(path: str | Path, source: NetworkFile) -> dict[str, Any]:
    """A result of fastgan.evaluate for the network file `source`; UserError for anything else."""
    expected = "a result of fastgan.evaluate for a checkpoint expected"
    found = require_file(path, "a result of fastgan.evaluate")
    try:
        with found.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        result = parse_object(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(error)}, {path}, {expected}") from error
    for key, kind in _KEYS.items():
        value = result.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{key}={shown(value)}, {path}, {expected}")
    if not abs(result["value"]) <= sys.float_info.max:
        raise UserError(f"value={shown(result['value'])}, {path}, a finite number expected")
    measured = result["checkpoint"]
    if measured.get("sha256") != source.sha256:
        raise UserError(
            f"measured with {shown(measured.get('file'))} of sha256 "
            f"{shown(measured.get('sha256'))}, {path}, a result of {source.path} expected, "
            f"whose sha256 is {source.sha256}"
        )
    return result
