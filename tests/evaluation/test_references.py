"""Statistics files: EDM's format both ways, and files that lie; more of those in tests/hostile."""

import json
import struct
import zipfile
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


def _write_member(path: Path, name: str, header: str, data: bytes) -> None:
    """An .npz with one hand-made .npy member."""
    text = header.encode().ljust(118) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.npy", member)


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
    ],
)
def test_wrong_statistics(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        read_statistics(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value) and "bad.npz" in str(caught.value)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 4, 5, 3), np.uint8)],
)
def test_wrong_images(tmp_path: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "bad.npz", arr_0=images)
    with pytest.raises(UserError, match=r"entry arr_0 of .*bad\.npz"):
        next(read_images(tmp_path / "bad.npz", 2))


def test_pickled_object_array_is_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (marker,))

    np.savez(tmp_path / "bomb.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match=r"object array .* entry mu"):
        read_statistics(tmp_path / "bomb.npz")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["edm2.pkl", "disguised.npz"])
def test_pickles_are_refused_with_advice(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04}q\x00.")
    with pytest.raises(UserError, match=r"never opened.*'fid'.*numpy\.savez"):
        read_statistics(tmp_path / name)


def test_declared_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "huge.npz"
    for header, message in {
        "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}": "1 to 8192",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (8,)}": "60 bytes of 64, entry mu",
        "__import__('os').getcwd()": "no readable numpy header, entry mu",
    }.items():
        _write_member(path, "mu", header, b"\0" * 60)
        with pytest.raises(UserError, match=message):
            read_statistics(path)
    images = "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 4, 4, 3)}"
    _write_member(path, "arr_0", images, b"\0" * 96)
    batches = read_images(path, 2)
    assert next(batches).shape == (2, 3, 4, 4)
    with pytest.raises(UserError, match="cut off"):
        next(batches)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replace_atomically(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match="is a folder"), replace_atomically(tmp_path):
        pass
