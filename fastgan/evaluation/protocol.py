"""From images to a number that carries its provenance.

Statistics of a dataset, of a generator or of a file, split over the processes; then `score`, which
names the metric by what was really measured. Paper protocol: 50,000 images of seeds 0-49999, the
Inception network with its own resize, the published reference statistics.
"""

import hashlib
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastgan.common import distributed
from fastgan.common.errors import UserError
from fastgan.common.files import file_sha256
from fastgan.data.dataset import ImageDataset
from fastgan.evaluation.features import FeatureExtractor
from fastgan.evaluation.frechet import (
    FeatureStatistics,
    Statistics,
    Where,
    count_images,
    entries,
    frechet_distance,
    read_images,
    read_statistics,
)

QUANTISATION = "trunc(clip(127.5 x + 128, 0, 255))"
_MAX_RUNS = 4


def dataset_statistics(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    batch: int,
    *,
    progress: bool = False,
) -> Statistics:
    """Feature statistics of a dataset's images."""
    shares = _own_share(np.arange(len(dataset)), batch)
    batches = (torch.as_tensor(dataset.images(own)) for own in shares)
    source = {"dataset": dataset.provenance()}
    return _accumulate(batches, extractor, len(dataset), source, progress)


def generator_statistics(
    sample_fn: Callable[[list[int]], Tensor],
    seeds: Sequence[int],
    extractor: FeatureExtractor,
    batch: int,
    *,
    progress: bool = False,
) -> Statistics:
    """Feature statistics of generated images; every process makes its share of the seeds.

    sample_fn(seeds) gives uint8 [len(seeds), C, H, W], the image of each seed being the same in
    any batch: then neither the batch nor the number of processes changes the result.
    """
    batches = (sample_fn(own.tolist()) for own in _own_share(np.asarray(seeds), batch))
    source = {"seeds": describe_integers(seeds)}
    return _accumulate(batches, extractor, len(seeds), source, progress)


def npz_statistics(
    path: Where, extractor: FeatureExtractor, batch: int, *, progress: bool = False
) -> Statistics:
    """Feature statistics of the images in an .npz (entry `arr_0`, uint8 NHWC)."""
    source = {"file": Path(path).name, "sha256": file_sha256(path), "entry": "arr_0"}
    step = distributed.world_size()
    batches = islice(read_images(path, batch), distributed.rank(), None, step)
    return _accumulate(batches, extractor, count_images(path), source, progress)


def load_reference(path: Where, extractor: FeatureExtractor, batch: int = 64) -> Statistics:
    """Reference statistics from a file: its mu and sigma, or computed from its images.

    A file with both (ADM's) is used by its mu and sigma under the paper's Inception protocol, and
    by its images under any other extractor. UserError: statistics of another extractor.
    """
    names = entries(path)
    if "arr_0" in names and not ({"mu", "sigma"} <= names and extractor.name == "inception"):
        return npz_statistics(path, extractor, batch)
    statistics = read_statistics(path)
    _check_extractor(statistics, extractor, path)
    return statistics


def score(
    generated: Statistics, reference: Statistics, extractor: FeatureExtractor
) -> dict[str, Any]:
    """The Frechet distance with all that is needed to compare or repeat it, ready for JSON.

    `quantisation` is null for images read from files. `rank_deficient` is true where the images are
    too few to determine the covariance: such values depend strongly on n.
    """
    value = frechet_distance(
        generated.mean, generated.covariance, reference.mean, reference.covariance
    )
    seeds = generated.source.get("seeds")
    counts = [s.n for s in (generated, reference) if s.n is not None]
    # The result names the extractor once.
    sources = [
        {key: value for key, value in s.source.items() if key != "extractor"}
        for s in (generated, reference)
    ]
    return {
        "metric": metric_name(extractor.name, generated.n or 0),
        "value": value,
        "n": generated.n,
        "seeds": seeds,
        "generated": sources[0],
        "reference": {**sources[1], "n": reference.n},
        "extractor": extractor.provenance(),
        "resize": extractor.resize,
        "quantisation": None if seeds is None else QUANTISATION,
        "rank_deficient": any(n <= extractor.dim for n in counts),
        "versions": versions(),
    }


def metric_name(extractor: str, n: int) -> str:
    """fid50k only for 50,000 images under the Inception network of the papers.

    "inception" -> fid50k, fid10k, fid500; "clean" -> clean_fid50k; anything else -> FD-<name>.
    """
    count = f"{n // 1000}k" if n and n % 1000 == 0 else str(n)
    prefix = {"inception": "fid", "clean": "clean_fid"}.get(extractor)
    return f"FD-{extractor}" if prefix is None else f"{prefix}{count}"


def describe_integers(values: Sequence[int]) -> str:
    """Seeds as "0-49999" or "0-99,200,300-399"; many runs as a count and a sha256."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    if len(runs) > _MAX_RUNS:
        digest = hashlib.sha256(np.asarray(values, dtype="<i8").tobytes()).hexdigest()
        return f"{len(values)} values, sha256 {digest} as little-endian int64"
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    found = {"python": platform.python_version()}
    for package in ("fastgan", "torch", "numpy", "pillow", "timm", "clean-fid"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _own_share(values: np.ndarray, batch: int) -> list[np.ndarray]:
    """This process's batches: every size-th value, cut into pieces of at most `batch`."""
    if batch < 1 or len(values) == 0:
        raise UserError(
            f"{len(values)} images in batches of {batch}, in the evaluation, right is 1 or more"
        )
    own = values[distributed.rank() :: distributed.world_size()]
    return [own[start : start + batch] for start in range(0, len(own), batch)]


def _accumulate(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    total: int,
    source: dict[str, Any],
    progress: bool,
) -> Statistics:
    """Features of this process's batches, then the sum over the processes."""
    statistics = FeatureStatistics(extractor.dim, extractor.device)
    shown = progress and distributed.is_main()
    with tqdm(total=total, unit="img", desc=extractor.name, disable=not shown) as bar:
        for images in batches:
            with torch.no_grad():
                statistics.update(extractor(images))
            bar.update(min(len(images) * distributed.world_size(), total - bar.n))
    statistics.all_reduce()
    assert statistics.n == total, (statistics.n, total)
    return statistics.finish({**source, "extractor": extractor.provenance()})


def _check_extractor(statistics: Statistics, extractor: FeatureExtractor, path: Where) -> None:
    """Statistics must come from this extractor; strangers' files tell it by their size only."""
    if statistics.dim != extractor.dim:
        raise UserError(
            f"statistics of {statistics.dim} features, file {path}, right are {extractor.dim}, "
            f"computed with the extractor {extractor.name}"
        )
    stored = statistics.source.get("extractor")
    if stored is None:
        return
    ours = extractor.provenance()
    for key in sorted(ours.keys() - {"weights_file"}):
        if not isinstance(stored, dict) or stored.get(key) != ours[key]:
            raise UserError(
                f"statistics of another extractor ({key} differs), file {path}, "
                f"compute them with {extractor.name} and the same weights"
            )
