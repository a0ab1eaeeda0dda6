"""Numbers and their provenance: naming, subsets, references of the right extractor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgan.common.errors import UserError
from fastgan.evaluation.features import PixelPca
from fastgan.evaluation.frechet import Statistics, write_statistics
from fastgan.evaluation.protocol import (
    dataset_statistics,
    describe_integers,
    generator_statistics,
    load_reference,
    metric_name,
    npz_statistics,
    score,
)


class Dataset:
    """Random images of 1x4x4 pixels."""

    def __init__(self, n: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._images = rng.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self._images[indices]

    def provenance(self) -> dict[str, Any]:
        return {"name": "random"}


class Pixels:
    """An extractor whose features are known: the raw values."""

    name, dim, resize, device = "inception", 16, "none", torch.device("cpu")

    def __init__(self, weights: str = "a") -> None:
        self.weights = weights

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name, "weights_file": "f", "weights_sha256": self.weights}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def _noise(seeds: list[int]) -> torch.Tensor:
    draw = [np.random.default_rng(s).integers(0, 256, (1, 4, 4), dtype=np.uint8) for s in seeds]
    return torch.from_numpy(np.stack(draw))


@pytest.mark.parametrize(
    ("extractor", "n", "name"),
    [
        ("inception", 50000, "fid50k"), ("inception", 10000, "fid10k"),
        ("inception", 500, "fid500"), ("inception", 49999, "fid49999"),
        ("clean", 50000, "clean_fid50k"), ("R56", 50000, "FD-R56"), ("pca32", 1000, "FD-pca32"),
    ],
)  # fmt: skip
def test_metric_names(extractor: str, n: int, name: str) -> None:
    assert metric_name(extractor, n) == name


def test_integers_in_words() -> None:
    assert describe_integers(range(50000)) == "0-49999"
    assert describe_integers([3, 5, 6, 7]) == "3,5-7"
    long = describe_integers(range(0, 100, 2))
    assert long.startswith("50 values, sha256 ") and long != describe_integers(range(0, 101, 2))


def test_dataset_statistics_equal_numpy() -> None:
    dataset = Dataset(103, 0)
    found = dataset_statistics(dataset, Pixels(), 10)
    values = dataset._images.reshape(103, -1).astype(np.float64)
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(values, rowvar=False), rtol=1e-9)
    assert found.n == 103 and found.source["dataset"] == {"name": "random"}
    with pytest.raises(UserError, match="0 images in batches of 10"):
        dataset_statistics(Dataset(0, 0), Pixels(), 10)


def test_score_carries_its_provenance() -> None:
    reference = dataset_statistics(Dataset(200, 1), Pixels(), 64)
    generated = generator_statistics(_noise, range(100), Pixels(), 32)
    result = json.loads(json.dumps(score(generated, reference, Pixels())))
    assert result["metric"] == "fid100" and result["n"] == 100 and result["seeds"] == "0-99"
    assert result["value"] > 0 and result["reference"]["n"] == 200
    assert result["reference"]["dataset"] == {"name": "random"}
    assert result["extractor"]["weights_sha256"] == "a" and result["resize"] == "none"
    assert result["quantisation"] == "trunc(clip(127.5 x + 128, 0, 255))"
    assert result["versions"]["torch"] == torch.__version__
    assert result["rank_deficient"] is False
    few = generator_statistics(_noise, range(16), Pixels(), 32)
    assert score(few, reference, Pixels())["rank_deficient"] is True
    real = score(reference, reference, Pixels())
    assert real["value"] == pytest.approx(0, abs=1e-6)
    assert real["seeds"] is None and real["quantisation"] is None


def test_references_round_trip_and_know_their_extractor(tmp_path: Path) -> None:
    path, made = tmp_path / "ref.npz", dataset_statistics(Dataset(50, 2), Pixels(), 16)
    write_statistics(path, made)
    read = load_reference(path, Pixels())
    assert torch.equal(read.covariance, made.covariance) and read.source["sha256"]
    with pytest.raises(UserError, match=r"another extractor \(weights_sha256 differs"):
        load_reference(path, Pixels("b"))
    other = PixelPca.fit(_noise(list(range(9))), 3)
    with pytest.raises(UserError, match=r"statistics of 16 features, .* right are 3, .* pca3"):
        load_reference(path, other)


def test_reference_batches_of_images(tmp_path: Path) -> None:
    """ADM's files: mu and sigma belong to Inception, the images to everyone."""
    images = _noise(list(range(40)))
    path = tmp_path / "adm.npz"
    nhwc = images.permute(0, 2, 3, 1).numpy()
    np.savez(path, arr_0=nhwc, mu=np.zeros(16), sigma=np.eye(16))
    assert load_reference(path, Pixels()).mean.tolist() == [0.0] * 16
    other = Pixels()
    other.name = "other"
    from_images = load_reference(path, other, batch=7)
    expected = generator_statistics(_noise, range(40), other, 40)
    torch.testing.assert_close(from_images.mean, expected.mean)
    assert from_images.n == 40 and from_images.source["entry"] == "arr_0"
    torch.testing.assert_close(npz_statistics(path, other, 100).covariance, expected.covariance)


def test_strangers_statistics_are_taken_by_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "edm.npz", mu=np.zeros(16), sigma=np.eye(16))
    reference = load_reference(tmp_path / "edm.npz", Pixels())
    assert reference.n is None
    generated = Statistics(torch.ones(16), torch.eye(16), 50000, {"seeds": "0-49999"})
    result = score(generated, reference, Pixels())
    assert result["metric"] == "fid50k" and result["value"] == pytest.approx(16.0)
    assert result["reference"]["file"] == "edm.npz" and result["rank_deficient"] is False
