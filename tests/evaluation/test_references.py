"""Statistics files: EDM's format both ways, and files that lie; more of those in tests/hostile."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically
from fastgan.evaluation.frechet import (
    Statistics,
    count_images,
    entries,
    read_images,
    read_statistics,
    write_statistics,
)


def _statistics(dim: int = 5) -> Statistics:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, dim, generator=generator, dtype=torch.float64)
    return Statistics(features.mean(0), torch.cov(features.T), 50, {"dataset": {"name": "x"}})


def test_round_trip_and_edm_reader(tmp_path: Path) -> None:
    path, written = tmp_path / "ours.npz", _statistics()
    write_statistics(path, written)
    read = read_statistics(path)
    assert torch.equal(read.mean, written.mean)
    assert torch.equal(read.covariance, written.covariance)
    assert read.n == 50 and read.source["dataset"] == {"name": "x"}
    assert read.source["file"] == "ours.npz" and len(read.source["sha256"]) == 64
    with np.load(path, allow_pickle=False) as other:
        assert other["mu"].dtype == other["sigma"].dtype == np.float64
        assert other["sigma"].shape == (5, 5)
        assert json.loads(str(other["provenance"]))["n"] == 50
    assert [p.name for p in tmp_path.iterdir()] == ["ours.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_edm_and_adm_files(tmp_path: Path, save) -> None:
    path = tmp_path / "edm.npz"
    save(path, mu=np.arange(3.0), sigma=np.eye(3), mu_s=np.zeros(9))
    assert read_statistics(path).mean.tolist() == [0, 1, 2]
    assert read_statistics(path).n is None
    assert entries(path) == {"mu", "sigma", "mu_s"}


def test_images_are_streamed_in_order(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "samples.npz", arr_0=images)
    batches = list(read_images(tmp_path / "samples.npz", 3))
    assert [len(b) for b in batches] == [3, 3, 1]
    assert count_images(tmp_path / "samples.npz") == 7
    np.testing.assert_array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "missing, entry sigma of"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu has shape \[3\] and sigma \[4, 4\]"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, r"shape \[3, 1\], entry mu of"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "NaN or infinite"),
        ({"mu": np.zeros(3, np.int64), "sigma": np.eye(3)}, "int64 array .* entry mu of"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"mu": np.zeros(9000), "sigma": np.eye(3)}, "entry mu of .* 1 to 8192"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "provenance": np.array("[1]")}, "no JSON object"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "provenance": np.zeros(2)}, "entry provenance"),
        ({"mu": np.array([open], dtype=object), "sigma": np.eye(1)}, "object array .* entry mu"),
    ],
)
def test_wrong_statistics(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        read_statistics(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value) and "bad.npz" in str(caught.value)


@pytest.mark.parametrize("name", ["edm2.pkl", "disguised.npz"])
def test_pickles_are_refused_with_advice(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04}q\x00.")
    with pytest.raises(UserError, match=r"never opened.*'fid'.*numpy\.savez"):
        read_statistics(tmp_path / name)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replace_atomically(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match="is a folder"), replace_atomically(tmp_path):
        pass
