"""Mean and covariance of features, the Frechet distance between two Gaussians, reference files.

d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)      (Heusel et al. 2017, equation 6)

Reference files are .npz archives with mu and sigma, or with images; a stranger's is read without
pickle, its sizes are checked before memory is taken, images are streamed.
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
from torch import Tensor

from fastgan.common import distributed
from fastgan.common.errors import UserError, shown
from fastgan.common.files import file_sha256, parse_object, replace_atomically, require_file

# How far below zero an eigenvalue may lie, as a share of the largest: covariances computed in
# float32 reach 1e-6, and a matrix beyond this is none.
_NEGATIVE_SHARE = 1e-4
# Products of three such numbers still fit into float64.
_LARGEST = 1e100
MAX_DIM = 8192
_MAX_PROVENANCE = 1 << 20
# Statistics hardly compress; images, which may be all black, are read piece by piece instead.
_MAX_RATIO = 100
_ACCEPTED = "an .npz with mu [D] and sigma [D, D], or with uint8 images arr_0 [N, H, W, C]"
Where = str | os.PathLike[str]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to features: float64 mean [D], covariance [D, D] (on the CPU), how many
    images it was fitted to (None: unknown) and where these came from."""

    mean: Tensor
    covariance: Tensor
    n: int | None
    source: dict[str, Any]

    @property
    def dim(self) -> int:
        return self.mean.shape[0]


class FeatureStatistics:
    """Running sum f and sum f f^T in float64; divided once, after the sum over processes.

    Float64 makes raw moments safe: with means of 1e3 and a variance of 1 the covariance keeps
    about nine digits.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.n = 0
        self._sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Adds features [N, D]. UserError: not finite."""
        assert features.ndim == 2 and features.shape[1] == self.dim, tuple(features.shape)
        if not bool(features.isfinite().all()):
            raise UserError(
                "features are NaN or infinite, in the feature extractor's output, "
                "check the images and the extractor's weights"
            )
        values = features.to(self._sum)
        self.n += len(values)
        self._sum += values.sum(0)
        self._outer.addmm_(values.T, values)

    def all_reduce(self) -> None:
        """Sums over the processes; afterwards every process holds the statistics of all images."""
        count = torch.tensor([self.n], dtype=torch.int64, device=self._sum.device)
        self.n = int(distributed.all_reduce_sum(count).item())
        distributed.all_reduce_sum(self._sum)
        distributed.all_reduce_sum(self._outer)

    @property
    def mean(self) -> Tensor:
        """Float64 [D]."""
        assert self.n > 0, "no features yet"
        return self._sum / self.n

    @property
    def covariance(self) -> Tensor:
        """Unbiased (divided by n - 1), float64 [D, D]. UserError: fewer than two images."""
        if self.n < 2:
            raise UserError(f"{self.n} images have no covariance, in the statistics, use 2 or more")
        mean = self.mean
        return (self._outer - self.n * torch.outer(mean, mean)) / (self.n - 1)

    def finish(self, source: dict[str, Any]) -> Statistics:
        """The fitted Gaussian with its source, on the CPU."""
        return Statistics(self.mean.cpu(), self.covariance.cpu(), self.n, source)


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared Frechet distance of N(mu1, sigma1) and N(mu2, sigma2), what "FID" reports.

    mu [D], sigma [D, D]; computed in float64 with symmetric eigenvalues alone:
    tr (S1 S2)^(1/2) = tr (r S2 r)^(1/2), r = S1^(1/2), since both products share their
    eigenvalues. This also holds for singular covariances, where a general matrix square root
    needs help. UserError: dimensions that differ, NaN, a sigma that is no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (t.to(torch.float64) for t in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise UserError(
            f"{mu1.numel()} and {mu2.numel()} features cannot be compared, in the two statistics, "
            "take both from the same extractor"
        )
    check_gaussian(mu1, sigma1, "first statistics")
    check_gaussian(mu2, sigma2, "second statistics")
    _checked(torch.linalg.eigvalsh((sigma2 + sigma2.T) / 2), "second statistics")
    root = _symmetric_root(sigma1, "first statistics")
    product = root @ sigma2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    # Equal Gaussians end a rounding error below zero.
    return max(float(distance), 0.0)


def check_gaussian(mu: Tensor, sigma: Tensor, where: str) -> None:
    """UserError unless mu is [D], sigma [D, D], both finite, and sigma symmetric."""
    if mu.ndim != 1 or tuple(sigma.shape) != (len(mu), len(mu)):
        raise UserError(
            f"mu has shape {list(mu.shape)} and sigma {list(sigma.shape)}, in the {where}, "
            "right is [D] and [D, D]"
        )
    if not (mu.abs().max() < _LARGEST and sigma.abs().max() < _LARGEST):
        raise UserError(f"mu or sigma is NaN or infinite, in the {where}, compute them again")
    if bool((sigma - sigma.T).abs().max() > _NEGATIVE_SHARE * sigma.abs().max()):
        raise UserError(f"sigma is not symmetric, in the {where}, right is a covariance matrix")


def _symmetric_root(sigma: Tensor, where: str) -> Tensor:
    """The symmetric r with r r = sigma."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    return (vectors * _checked(values, where).sqrt()) @ vectors.T


def _checked(eigenvalues: Tensor, where: str) -> Tensor:
    """Eigenvalues of a covariance with rounding's tiny negatives set to zero."""
    smallest = float(eigenvalues[0])
    if smallest < -_NEGATIVE_SHARE * float(eigenvalues.abs().max()):
        raise UserError(
            f"sigma has the eigenvalue {smallest:.3g}, in the {where}, "
            "right is a covariance matrix, which has none below zero"
        )
    return eigenvalues.clamp(min=0)


def entries(path: Where) -> set[str]:
    """Names of the arrays in an .npz file. UserError: no such file, a pickle, no .npz."""
    with _open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_statistics(path: Where) -> Statistics:
    """The Gaussian stored in a statistics file; source = {"file", "sha256", ...its provenance}.

    UserError, naming file and entry: missing entry, wrong type or shape, NaN, more than 8192
    dimensions, damaged file.
    """
    with _open_npz(path) as archive:
        mu = _read_floats(archive, path, "mu")
        sigma = _read_floats(archive, path, "sigma")
        provenance = _read_provenance(archive, path)
    check_gaussian(mu, sigma, f"file {path}")
    n = provenance.pop("n", None)
    known = type(n) is int and 0 < n < 1 << 40
    source = {**provenance, "file": Path(path).name, "sha256": file_sha256(path)}
    return Statistics(mu, sigma, n if known else None, source)


def write_statistics(path: Where, statistics: Statistics) -> None:
    """Writes mu, sigma and the provenance (n and the source) in EDM's format, atomically."""
    provenance = {"n": statistics.n, **statistics.source}
    with replace_atomically(path) as file:
        np.savez(
            file,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            provenance=np.array(json.dumps(provenance)),
        )


def read_images(path: Where, batch: int) -> Iterator[Tensor]:
    """uint8 images [k, C, H, W], k <= `batch`, streamed from the entry `arr_0` (NHWC).

    UserError: other types or shapes, a file that ends early.
    """
    with _open_npz(path) as archive, _open_entry(archive, path, "arr_0") as (file, shape, dtype):
        for start in range(0, shape[0], batch):
            part = (min(batch, shape[0] - start), *shape[1:])
            nhwc = torch.from_numpy(_read(file, part, dtype, f"entry arr_0 of {path}"))
            yield nhwc.permute(0, 3, 1, 2).contiguous()


def count_images(path: Where) -> int:
    """Number of images in the entry `arr_0`, from its header. UserError: as `read_images`."""
    with _open_npz(path) as archive, _open_entry(archive, path, "arr_0") as (_, shape, _):
        return shape[0]


@contextmanager
def _open_npz(path: Where) -> Iterator[zipfile.ZipFile]:
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
    archive: zipfile.ZipFile, path: Where, name: str
) -> Iterator[tuple[IO[bytes], Shape, np.dtype[Any]]]:
    """An entry's stream, positioned at its data, with its shape and type, which are checked."""
    where = f"entry {name} of {path}"
    if f"{name}.npy" not in archive.namelist():
        raise UserError(f"missing, {where}, right is {_ACCEPTED}")
    with archive.open(f"{name}.npy") as file:
        shape, dtype = _read_header(file, name, where)
        needed, size = math.prod(shape) * dtype.itemsize, os.path.getsize(path)
        if name != "arr_0" and needed > (1 << 20) + _MAX_RATIO * size:
            raise UserError(
                f"{needed} bytes in a file of {size}, {where}, "
                f"at most {_MAX_RATIO} times as many expected"
            )
        yield file, shape, dtype


def _read_header(file: IO[bytes], name: str, where: str) -> tuple[Shape, np.dtype[Any]]:
    """Shape and type of an array in C order; refuses those that the entry may not have."""
    npy = np.lib.format
    try:
        version = npy.read_magic(file)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = reader(file, max_header_size=4096)
    # A header is a Python literal, and what numpy's parser raises at a bad one has many kinds.
    except Exception as error:
        raise UserError(f"no readable numpy header, {where}, right is {_ACCEPTED}") from error
    if name == "provenance":
        good = dtype.kind == "U" and shape == () and dtype.itemsize <= _MAX_PROVENANCE
        wanted = "a JSON string of at most 1 MiB"
    elif name == "arr_0":
        good = dtype == np.uint8 and len(shape) == 4 and 0 < shape[1] == shape[2] <= 4096
        good = good and shape[0] > 0 and shape[3] in (1, 3)
        wanted = "uint8 [N, H, H, 1 or 3] in C order"
    else:
        good = dtype in (np.float32, np.float64) and all(0 < d <= MAX_DIM for d in shape)
        good = good and len(shape) == (1 if name == "mu" else 2)
        wanted = f"float64 {'[D]' if name == 'mu' else '[D, D]'} with D from 1 to {MAX_DIM}"
    if fortran or not good:
        found = f"{shown(str(dtype))} array of shape {shown(str(list(shape)))}"
        raise UserError(f"{found}, {where}, right is {wanted}")
    return shape, dtype


def _read_floats(archive: zipfile.ZipFile, path: Where, name: str) -> Tensor:
    with _open_entry(archive, path, name) as (file, shape, dtype):
        array = _read(file, shape, dtype, f"entry {name} of {path}")
    return torch.from_numpy(array.astype(np.float64))


def _read_provenance(archive: zipfile.ZipFile, path: Where) -> dict[str, Any]:
    if "provenance.npy" not in archive.namelist():
        return {}
    where = f"entry provenance of {path}"
    with _open_entry(archive, path, "provenance") as (file, shape, dtype):
        text = _read(file, shape, dtype, where)
    try:
        return parse_object(str(text))
    except ValueError as error:
        raise UserError(f"{error}, {where}, remove the entry or write it again") from error


def _read(file: IO[bytes], shape: Shape, dtype: np.dtype[Any], where: str) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    data = file.read(size)
    if len(data) != size:
        raise UserError(f"{len(data)} bytes of {size}, {where}, the file is cut off: get it again")
    return np.ndarray(shape, dtype, bytearray(data))
