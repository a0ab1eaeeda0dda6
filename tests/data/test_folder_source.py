"""Folders: EDM's layout unpacked, class folders, links, unreadable things."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.common.errors import UserError
from fastgan.data import open_dataset
from tests.data.pictures import refusal

PIXELS = np.random.default_rng(5).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def put(root: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[index]).save(root / name, "PNG")
    return root


def test_edm_layout(tmp_path: Path) -> None:
    put(tmp_path, "00001/img00001000.png", "00000/img00000000.png")
    index = {"labels": [["00000/img00000000.png", 2], ["00001/img00001000.png", 0]]}
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    dataset = open_dataset(tmp_path)
    assert dataset.labels is not None and dataset.labels.tolist() == [2, 0]
    assert np.array_equal(dataset.images(np.arange(2)), PIXELS[[1, 0]].transpose(0, 3, 1, 2))


def test_class_folders_in_alphabetical_order(tmp_path: Path) -> None:
    dataset = open_dataset(put(tmp_path, "wild/1.png", "cat/2.png", "dog/3.png", "cat/1.png"))
    assert dataset.labels is not None and dataset.labels.tolist() == [0, 0, 1, 2]
    assert dataset.labels.dtype == np.int64 and dataset.label_dim == 3
    assert np.array_equal(dataset.images(np.arange(4)), PIXELS[[3, 1, 2, 0]].transpose(0, 3, 1, 2))


def test_an_index_without_labels_beats_class_folders(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert open_dataset(tmp_path).labels is None


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
    put(tmp_path, "1.png", ".cache/2.png", ".3.png")
    (tmp_path / "notes.txt").write_text("x")
    assert len(open_dataset(tmp_path)) == 1


def test_the_fingerprint_changes_with_names(tmp_path: Path) -> None:
    one = open_dataset(put(tmp_path / "one", "a.png", "b.png")).provenance()
    same = open_dataset(put(tmp_path / "same", "a.png", "b.png")).provenance()
    other = open_dataset(put(tmp_path / "other", "a.png", "c.png")).provenance()
    assert one["fingerprint"] == same["fingerprint"] != other["fingerprint"]
    assert one["dataset"] == "one" and one["resampling"] == "not recorded"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("../out", "link leaves the folder"),
        ("../out/c.png", "link leaves the folder"),
        ("more", "link to a folder"),
        ("nowhere", "broken link"),
        ("link", "broken link"),
    ],
)
def test_links(tmp_path: Path, target: str, said: str) -> None:
    put(tmp_path, "set/a.png", "set/more/b.png", "out/c.png")
    (tmp_path / "set/inside.png").symlink_to("more/b.png")
    (tmp_path / "alias").symlink_to("set")
    assert len(open_dataset(tmp_path / "alias")) == 3
    (tmp_path / "set/link").symlink_to(target)
    assert f"{said}, link 'link'" in refusal(tmp_path / "set")


def test_empty_folder_and_vanished_image(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images, folder" in refusal(tmp_path / "empty")
    dataset = open_dataset(put(tmp_path / "set", "a.png", "b.png"))
    (tmp_path / "set/b.png").unlink()
    with pytest.raises(
        UserError, match=r"cannot read \(No such file or directory\), entry 'b\.png'"
    ):
        dataset.images(np.array([1]))
