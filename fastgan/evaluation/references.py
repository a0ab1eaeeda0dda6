"""Statistics files (.npz) of EDM, ADM and ourselves, read without trusting them.

EDM: `mu` float64 [D], `sigma` float64 [D, D] (unbiased). ADM's reference batches: the same two
and / or `arr_0`, uint8 images [N, H, W, C]; our samples have `arr_0` alone. Ours: EDM's two
entries plus `provenance`, a JSON string, which EDM's own reader ignores. Every entry's type and
size are read from its header before any memory is taken, and nothing is unpickled.
"""

import json
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fastgan.errors import UserError, shown
from fastgan.evaluation.frechet import Statistics, check_gaussian
from fastgan.files import file_sha256, replace_atomically, require_file
from fastgan.json_object import parse_object

MAX_DIM = 8192
_MAX_PROVENANCE = 1 << 20
# Statistics hardly compress; images, which may be all black, are read piece by piece instead.
_MAX_RATIO = 100
_ACCEPTED = "an .npz with mu [D] and sigma [D, D], or with uint8 images arr_0 [N, H, W, C]"


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entries(path: str | os.PathLike[str]) -> set[str]:
    """Names of the arrays in an .npz file. UserError: no such file, a pickle, no .npz."""
    with _open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_statistics(path: str | os.PathLike[str]) -> Statistics:
    """The Gaussian stored in a statistics file; source = {"file", "sha256", ...its provenance}.

    UserError, naming file and entry: missing entry, wrong type or shape, NaN, more than 8192
    dimensions, damaged file.
    """
    with _open_npz(path) as archive:
        mu = _read_floats(archive, path, "mu", ndim=1)
        sigma = _read_floats(archive, path, "sigma", ndim=2)
        provenance = _read_provenance(archive, path)
    check_gaussian(mu, sigma, f"file {path}")
    n = provenance.pop("n", None)
    known = type(n) is int and 0 < n < 1 << 40
    source = {**provenance, "file": Path(path).name, "sha256": file_sha256(path)}
    return Statistics(mu, sigma, n if known else None, source)


def write_statistics(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Writes mu, sigma and the provenance (n and the source) in EDM's format, atomically."""
    provenance = {"n": statistics.n, **statistics.source}
    with replace_atomically(path) as file:
        np.savez(
            file,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            provenance=np.array(json.dumps(provenance)),
        )


def read_images(path: str | os.PathLike[str], batch: int) -> Iterator[torch.Tensor]:
    """uint8 images [k, C, H, W], k <= `batch`, streamed from the entry `arr_0` (NHWC).

    UserError: other types or shapes, a file that ends early.
    """
    with _open_npz(path) as archive, _open_entry(archive, path, "arr_0") as (file, header):
        images = header.shape[0]
        for start in range(0, images, batch):
            shape = (min(batch, images - start), *header.shape[1:])
            block = _read_exactly(file, math.prod(shape), f"entry arr_0 of {path}")
            nhwc = torch.frombuffer(bytearray(block), dtype=torch.uint8).reshape(shape)
            yield nhwc.permute(0, 3, 1, 2).contiguous()


def count_images(path: str | os.PathLike[str]) -> int:
    """Number of images in the entry `arr_0`, from its header. UserError: as `read_images`."""
    with _open_npz(path) as archive, _open_entry(archive, path, "arr_0") as (_, header):
        return header.shape[0]


@contextmanager
def _open_npz(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    require_file(path, f"a statistics file: {_ACCEPTED}")
    with open(path, "rb") as file:
        start = file.read(2)
    # Pickles of protocol 2 and later start with PROTO: EDM2 ships its references like this.
    if Path(path).suffix == ".pkl" or start[:1] == b"\x80":
        raise UserError(
            f"a pickle is never opened, file {path}, save its mu and sigma (EDM2: the entries "
            "under 'fid') once with numpy.savez where you trust it, and give that .npz"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:  # zipfile and zlib raise nearly anything on broken bytes
        raise UserError(
            f"damaged or no .npz ({shown(error)}), file {path}, give {_ACCEPTED}"
        ) from error


@contextmanager
def _open_entry(
    archive: zipfile.ZipFile, path: str | os.PathLike[str], name: str
) -> Iterator[tuple[IO[bytes], _Header]]:
    """An entry's stream, positioned at its data, with its header checked."""
    where = f"entry {name} of {path}"
    if f"{name}.npy" not in archive.namelist():
        raise UserError(f"missing, {where}, right is {_ACCEPTED}")
    with archive.open(f"{name}.npy") as file:
        header = _read_header(file, where)
        _check_header(header, name, where)
        if name != "arr_0":
            _check_ratio(header.nbytes, os.path.getsize(path), where)
        yield file, header


def _check_ratio(nbytes: int, file_size: int, where: str) -> None:
    if nbytes > (1 << 20) + _MAX_RATIO * file_size:
        raise UserError(
            f"{nbytes} bytes in a file of {file_size}, {where}, "
            f"at most {_MAX_RATIO} times as many expected"
        )


def _read_header(file: IO[bytes], where: str) -> _Header:
    npy = np.lib.format
    try:
        version = npy.read_magic(file)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return _Header(*reader(file, max_header_size=4096))
    # A header is a Python literal, and what numpy's parser raises at a bad one has many kinds.
    except Exception as error:
        raise UserError(f"no readable numpy header, {where}, right is {_ACCEPTED}") from error


def _check_header(header: _Header, name: str, where: str) -> None:
    """Refuses types and sizes that the entry may not have."""
    shape = list(header.shape)
    if name == "provenance":
        good = header.dtype.kind == "U" and shape == [] and header.nbytes <= _MAX_PROVENANCE
        wanted = "a JSON string of at most 1 MiB"
    elif name == "arr_0":
        good = header.dtype == np.uint8 and len(shape) == 4 and not header.fortran
        good = good and shape[0] > 0 and shape[1] == shape[2] > 0 and shape[3] in (1, 3)
        good = good and shape[1] <= 4096
        wanted = "uint8 [N, H, H, 1 or 3] in C order"
    else:
        good = header.dtype in (np.float32, np.float64) and all(0 < d <= MAX_DIM for d in shape)
        good = good and not header.fortran
        wanted = f"float64 with 1 to {MAX_DIM} dimensions"
    if not good:
        found = f"{shown(str(header.dtype))} array of shape {shown(str(shape))}"
        raise UserError(f"{found}, {where}, right is {wanted}")


def _read_floats(
    archive: zipfile.ZipFile, path: str | os.PathLike[str], name: str, ndim: int
) -> torch.Tensor:
    with _open_entry(archive, path, name) as (file, header):
        if len(header.shape) != ndim:
            raise UserError(
                f"array of shape {list(header.shape)}, entry {name} of {path}, "
                f"right is {'[D]' if ndim == 1 else '[D, D]'}"
            )
        data = _read_exactly(file, header.nbytes, f"entry {name} of {path}")
    array = np.frombuffer(data, header.dtype).reshape(header.shape)
    return torch.from_numpy(array.astype(np.float64))


def _read_provenance(archive: zipfile.ZipFile, path: str | os.PathLike[str]) -> dict[str, Any]:
    if "provenance.npy" not in archive.namelist():
        return {}
    where = f"entry provenance of {path}"
    with _open_entry(archive, path, "provenance") as (file, header):
        data = _read_exactly(file, header.nbytes, where)
    try:
        return parse_object(str(np.frombuffer(data, header.dtype)[0]))
    except (ValueError, IndexError) as error:
        raise UserError(f"{error}, {where}, remove the entry or write it again") from error


def _read_exactly(file: IO[bytes], size: int, where: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise UserError(f"{len(data)} bytes of {size}, {where}, the file is cut off: get it again")
    return data
