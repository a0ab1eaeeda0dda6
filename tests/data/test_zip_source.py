"""Zips: the format itself, what is refused, processes; damaged bytes: tests/hostile."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.common.errors import UserError
from fastgan.data import open_dataset
from tests.data.pictures import encoded, refusal, write_zip

PIXELS = np.random.default_rng(3).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def small_zip(path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    names = [f"00000/img{i:08d}.png" for i in range(5)]
    entries = {name: encoded(PIXELS[i]) for i, name in enumerate(names)}
    return write_zip(path, entries, [[name, i % 2] for i, name in enumerate(names)], method)


def zip_of(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, encoded(PIXELS[0]))
    return path


def set_in_headers(path: Path, local: int, central: int, value: int) -> None:
    """Sets a 16-bit field of every local (PK 3 4) and central (PK 1 2) header."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        position = data.find(signature)
        while position >= 0:
            struct.pack_into("<H", data, position + offset, value)
            position = data.find(signature, position + 4)
    path.write_bytes(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stored_and_deflated(tmp_path: Path, method: int) -> None:
    dataset = open_dataset(small_zip(tmp_path / "a.zip", method))
    assert np.array_equal(dataset.images(np.arange(5)), PIXELS.transpose(0, 3, 1, 2))
    assert dataset.labels is not None and dataset.labels.tolist() == [0, 1, 0, 1, 0]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    stored = open_dataset(small_zip(tmp_path / "a.zip")).provenance()["fingerprint"]
    deflated = small_zip(tmp_path / "b.zip", zipfile.ZIP_DEFLATED)
    assert open_dataset(deflated).provenance()["fingerprint"] == stored
    with zipfile.ZipFile(deflated, "a") as archive:
        archive.writestr("00000/img00000005.png", encoded(PIXELS[0]))
        archive.writestr("README.txt", "ignored")
    labels_missing = refusal(deflated)
    assert "no label for '00000/img00000005.png'," in labels_missing


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: zip_of(p, "a.png", "../b.png"), "path leaves the archive, entry '../b.png'"),
        (lambda p: zip_of(p, "a.png", "x\\b.png"), "path leaves the archive, entry 'x\\\\b.png'"),
        (lambda p: zip_of(p, "a.png", "b.png", "a.png"), "duplicate name, entry 'a.png'"),
        (lambda p: set_in_headers(small_zip(p), 6, 8, 1), "encrypted, entry '00000/img00000000"),
        (lambda p: small_zip(p, zipfile.ZIP_BZIP2), "compression method 12, entry '00000/img0000"),
        (lambda p: zip_of(p, "set/a.png", "set/dataset.json"), "labels in 'set/dataset.json'"),
        (lambda p: zip_of(p, "a.txt"), "no images, zip"),
        (lambda p: p.write_text("this is no zip"), "unreadable zip"),
        (lambda p: p.write_bytes(b""), "unreadable zip"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_refused_on_opening(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    change(tmp_path / "x.zip")
    assert said in refusal(tmp_path / "x.zip")


def test_what_is_no_image_is_ignored(tmp_path: Path) -> None:
    names = ["a.png", "b.txt", "__MACOSX/._a.png", ".hidden/c.png", "folder.png/d.bmp"]
    path = zip_of(tmp_path / "x.zip", *names)
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("e.png")
    assert len(open_dataset(path)) == 2


def test_a_zip_that_is_replaced_by_another_is_noticed(tmp_path: Path) -> None:
    dataset = pickle.loads(pickle.dumps(open_dataset(small_zip(tmp_path / "x.zip"))))  # noqa: TID251
    assert np.array_equal(dataset.images(np.arange(5)), PIXELS.transpose(0, 3, 1, 2))
    dataset = pickle.loads(pickle.dumps(dataset))  # noqa: TID251
    zip_of(tmp_path / "x.zip", "other.png")
    with pytest.raises(UserError, match="corrupt entry"):
        dataset.images(np.array([0]))


def test_a_forked_process_reads_through_its_own_handle(tmp_path: Path) -> None:
    # Entries far larger than a file's buffer: a shared position shows as mixed-up bytes.
    pixels = np.random.default_rng(4).integers(0, 256, (4, 256, 256), dtype=np.uint8)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for index, image in enumerate(pixels):
            with archive.open(f"{index}.bmp", "w") as file:
                Image.fromarray(image).save(file, "BMP")
    dataset = open_dataset(tmp_path / "x.zip")

    def all_equal() -> bool:
        read = (dataset.images(np.arange(4)) for _ in range(60))
        return all(np.array_equal(images[:, 0], pixels) for images in read)

    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if all_equal() else 1
        finally:
            os._exit(status)
    parent_sound = all_equal()
    assert os.waitpid(child, 0)[1] == 0 and parent_sound
