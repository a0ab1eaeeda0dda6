"""Datasets as training sees them: pixels, labels, subsets, and what is said of unfit images."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgan.common.errors import UserError
from fastgan.data import open_dataset
from fastgan.data.labels import has_class_folders
from tests.data.pictures import encoded, refusal, write_zip

RNG = np.random.default_rng(7)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def colour_zip(tmp_path: Path, labels: Any = None) -> Path:
    # Written backwards: the order of a dataset is that of its sorted names.
    entries = {f"00000/{i}.png": encoded(COLOUR[i]) for i in reversed(range(6))}
    return write_zip(tmp_path / "colour.zip", entries, labels)


def test_pixels_come_back_in_the_order_of_sorted_names(tmp_path: Path) -> None:
    dataset = open_dataset(colour_zip(tmp_path))
    batch = dataset.images(np.array([4, 0, 4]))
    assert batch.dtype == np.uint8
    assert np.array_equal(batch, COLOUR[[4, 0, 4]].transpose(0, 3, 1, 2))
    assert (len(dataset), dataset.resolution, dataset.channels) == (6, 8, 3)
    assert (dataset.labels, dataset.label_dim) == (None, 0)
    assert dataset.images(np.array([], np.int64)).shape == (0, 3, 8, 8)


def test_grey_images_make_a_dataset_of_one_channel(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "g.zip", {f"{i}.png": encoded(COLOUR[i, :, :, 0]) for i in (0, 1)})
    dataset = open_dataset(path)
    assert dataset.channels == 1
    assert np.array_equal(dataset.images(np.arange(2))[:, 0], COLOUR[:2, :, :, 0])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP"])
def test_other_kinds_are_read(tmp_path: Path, kind: str) -> None:
    flat = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    path = write_zip(tmp_path / "x.zip", {f"a.{kind}": encoded(flat, kind=kind)})
    image = open_dataset(path).images(np.array([0]))[0]
    assert np.abs(image.astype(int) - np.array([200, 100, 50])[:, None, None]).max() <= 4


def test_class_labels_follow_names_not_list_order(tmp_path: Path) -> None:
    labels = [[f"00000/{i}.png", i % 4] for i in (5, 3, 1, 0, 2, 4)] + [["gone.png", 99]]
    dataset = open_dataset(colour_zip(tmp_path, labels))
    assert dataset.labels is not None and dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert dataset.label_dim == 4


def test_vector_labels(tmp_path: Path) -> None:
    labels = [[f"00000/{i}.png", [i, 0.5, -1.0]] for i in range(6)]
    dataset = open_dataset(colour_zip(tmp_path, labels))
    assert dataset.labels is not None and dataset.labels.dtype == np.float32
    assert dataset.labels[5].tolist() == [5.0, 0.5, -1.0]
    assert dataset.label_dim == 3


def with_label(value: Any) -> list[list[Any]]:
    return [[f"00000/{i}.png", value if i == 3 else 1] for i in range(6)]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (with_label(1)[:3], "no label for '00000/3.png' (and 2 more)"),
        ([], "no label for '00000/0.png'"),
        (with_label(-1), "label -1 of '00000/3.png'"),
        (with_label(True), "label true of '00000/3.png'"),
        (with_label("cat"), "label \"cat\" of '00000/3.png'"),
        (with_label([0.5]), "label [0.5] of '00000/3.png'"),
        ([[n, [0.5, v]] for n, v in with_label(float("nan"))], "label [0.5, NaN] of '00000/3.png'"),
        ([[n, [1.0] * v] for n, v in with_label(2)], "label [1.0, 1.0] of '00000/3.png'"),
        ([[n, []] for n, _ in with_label(1)], "label [] of '00000/0.png'"),
        ([*with_label(1), ["00000/2.png", 0]], "a second label for '00000/2.png'"),
        ([*with_label(1), ["00000/2.png"]], "'labels' entry 6"),
        ({"00000/0.png": 1}, "'labels' is no list"),
    ],
)
def test_bad_labels_name_the_image(tmp_path: Path, labels: Any, said: str) -> None:
    message = refusal(colour_zip(tmp_path, labels))
    assert said in message and "entry 'dataset.json' of zip" in message and "expected" in message


def test_null_labels_and_recorded_metadata(tmp_path: Path) -> None:
    index = {"labels": None, "resampling": "lanczos to 8", "source": "s", "other": [1]}
    entries = {"a.png": encoded(COLOUR[0]), "dataset.json": json.dumps(index).encode()}
    dataset = open_dataset(write_zip(tmp_path / "x.zip", entries))
    assert dataset.labels is None
    provenance = dataset.provenance()
    assert provenance["resampling"] == "lanczos to 8" and provenance["source"] == "s"
    assert provenance["dataset"] == "x.zip" and provenance["n"] == 1 and "other" not in provenance
    json.dumps(provenance)


def sixteen_bit_colour() -> bytes:
    """A PNG that Pillow would open as 8-bit RGB; only its header is ever looked at."""
    data = bytearray(encoded(COLOUR[0]))
    data[24] = 16
    return bytes(data)


ODD_IMAGES = [
    (encoded(COLOUR[0, :7]), "image of 8 x 7"),
    (encoded(COLOUR[0, :4, :4]), "image of 4 x 4"),
    (encoded(COLOUR[0], "P"), "image mode P"),
    (encoded(COLOUR[0], "RGBA"), "image mode RGBA"),
    (encoded(COLOUR[0], "L"), "image mode L"),
    (encoded(COLOUR[0, :, :, 0].astype(np.uint16) * 257), "16-bit image"),
    (sixteen_bit_colour(), "16-bit image"),
    (b"no picture", "unreadable image"),
    (encoded(COLOUR[0], kind="GIF"), "unreadable image"),
]


@pytest.mark.parametrize(("data", "said"), ODD_IMAGES)
def test_an_unfit_image_is_named_on_opening(tmp_path: Path, data: bytes, said: str) -> None:
    sound = encoded(COLOUR[0])
    message = refusal(
        write_zip(tmp_path / "x.zip", {"a.png": sound, "b.png": data, "c.png": sound})
    )
    assert f"{said}, entry 'b.png' of zip" in message and "expected" in message
    # As the first one: a grey or smaller image would set the mode or size of all.
    if said not in ("image of 4 x 4", "image mode L"):
        message = refusal(write_zip(tmp_path / "y.zip", {"a.png": data, "b.png": sound}))
        assert f"{said}, entry 'a.png'" in message


@pytest.mark.parametrize("position", range(0, 200, 29))
def test_a_damaged_png_is_found_when_it_is_read(tmp_path: Path, position: int) -> None:
    """In a folder nothing but the PNG's own checksums tells that a bit has flipped."""
    data = bytearray(encoded(COLOUR[1]))
    data[position + 8] ^= 4
    (tmp_path / "a.png").write_bytes(encoded(COLOUR[0]))
    (tmp_path / "b.png").write_bytes(data)
    with pytest.raises(UserError, match=r"entry 'b\.png' of folder"):
        open_dataset(tmp_path).images(np.array([0, 1]))


def test_a_subset_is_fixed_nested_and_keeps_label_dim(tmp_path: Path) -> None:
    path = colour_zip(tmp_path, [[f"00000/{i}.png", i] for i in range(6)])
    chosen = {}
    for size in (2, 4):
        dataset = open_dataset(path, max_images=size)
        assert dataset.labels is not None and dataset.label_dim == 6 and len(dataset) == size
        indices = dataset.labels
        assert np.array_equal(
            dataset.images(np.arange(size)), COLOUR[indices].transpose(0, 3, 1, 2)
        )
        assert dataset.provenance()["subset_of"] == 6 and dataset.provenance()["n"] == size
        chosen[size] = indices.tolist()
    assert set(chosen[2]) < set(chosen[4]) and chosen[4] == sorted(chosen[4])
    assert len(open_dataset(path, max_images=7)) == 6
    with pytest.raises(UserError, match="max_images=0"):
        open_dataset(path, max_images=0)


def test_nothing_there(tmp_path: Path) -> None:
    assert "no dataset at" in refusal(tmp_path / "missing.zip")


def test_importing_stays_light() -> None:
    program = "import sys, fastgan.data; print({'torch', 'sklearn', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat/1.png", "dog/1.png"], True),
        (["cat/1.png", "cat/2.png"], False),
        (["cat/1.png", "dog/1.png", "0.png"], False),
        (["a/cat/1.png", "a/dog/1.png"], False),
        (["00000/1.png", "00001/1.png"], False),
        (["00000/1.png", "dog/1.png"], True),
    ],
)
def test_which_folders_count_as_classes(names: list[str], expected: bool) -> None:
    assert has_class_folders(names) is expected
