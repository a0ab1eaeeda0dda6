"""Conversion to a dataset zip: the transforms' arithmetic and the format that is written."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.common.errors import UserError
from fastgan.data import open_dataset
from fastgan.data.convert import TRANSFORMS, Conversion, convert, entry_name

RNG = np.random.default_rng(13)


def picture(width: int, height: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def put(root: Path, name: str, pixels: np.ndarray, mode: str | None = None) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(root / name)


def transformed(name: str, pixels: np.ndarray, resolution: int) -> np.ndarray:
    return np.asarray(TRANSFORMS[name](Image.fromarray(pixels), resolution, "entry"))


def lanczos_matrix(size: int, target: int) -> np.ndarray:
    """[target, size]: sinc(x) sinc(x / 3), as wide as the reduction asks, rows summing to 1."""
    scale = size / target
    centres = (np.arange(target)[:, None] + 0.5) * scale
    x = (np.arange(size)[None] + 0.5 - centres) / scale
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def reduced(pixels: np.ndarray, target: int) -> np.ndarray:
    matrix = lanczos_matrix(len(pixels), target)
    rows = np.clip(np.einsum("tx,yxc->ytc", matrix, pixels.astype(float)), 0, 255).round()
    return np.clip(np.einsum("ty,yxc->txc", matrix, rows), 0, 255).round()


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 blocks, rounded half up after the rows and again after the columns."""
    height, width, _ = pixels.shape
    rows = np.floor(pixels.reshape(height, width // 2, 2, 3).mean(axis=2) + 0.5)
    return np.floor(rows.reshape(height // 2, 2, width // 2, 3).mean(axis=1) + 0.5)


@pytest.mark.parametrize(("side", "target"), [(32, 8), (20, 8), (8, 8)])
def test_lanczos_is_the_antialiased_filter(side: int, target: int) -> None:
    pixels = picture(side, side)
    difference = transformed("lanczos", pixels, target) - reduced(pixels, target)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("width", "height", "left", "top"), [(13, 8, 2, 0), (8, 12, 0, 2)])
def test_center_crop_keeps_the_central_square(width: int, height: int, left: int, top: int) -> None:
    pixels = picture(width, height)
    expected = pixels[top : top + 8, left : left + 8]
    assert np.array_equal(transformed("center-crop", pixels, 8), expected)
    assert np.array_equal(transformed("center-crop-dhariwal", pixels, 8), expected)


def test_center_crop_then_lanczos() -> None:
    pixels = picture(24, 16)
    difference = transformed("center-crop", pixels, 8) - reduced(pixels[:, 4:20], 8)
    assert np.abs(difference).max() <= 1


def test_dhariwal_halves_by_box_before_it_crops() -> None:
    pixels = picture(64, 32)
    expected = halved(halved(pixels))[:, 4:12]
    assert np.array_equal(transformed("center-crop-dhariwal", pixels, 8), expected)


def test_dhariwal_stops_halving_below_twice_the_resolution() -> None:
    """31 >= 2 x 8 halves once to 15, then bicubic makes the short side 8 and the long one 16."""
    assert transformed("center-crop-dhariwal", picture(60, 31), 8).shape == (8, 8, 3)
    wide = np.zeros((31, 62, 3), np.uint8)
    wide[:, 31:] = 255
    cropped = transformed("center-crop-dhariwal", wide, 8)
    assert (cropped[:, :3] < 30).all() and (cropped[:, 5:] > 225).all()


def test_edm_format(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out.zip"
    for name in ("dog/b.png", "cat/z.png", "dog/a.png"):
        put(source, name, picture(8, 8))
    assert convert(source, target, Conversion()) == 3
    with zipfile.ZipFile(target) as archive:
        names = ["00000/img00000000.png", "00000/img00000001.png", "00000/img00000002.png"]
        assert archive.namelist() == [*names, "dataset.json"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time[0] for info in archive.infolist()} == {1980}
        index = json.loads(archive.read("dataset.json"))
        assert index["labels"] == [[names[0], 0], [names[1], 1], [names[2], 1]]
        assert index["resampling"] == "none" and index["source"].startswith("source, names+sizes:")
        first = np.asarray(Image.open(io.BytesIO(archive.read(names[0]))))
    assert np.array_equal(first, np.asarray(Image.open(source / "cat/z.png")))
    assert entry_name(1_281_166) == "01281/img01281166.png"


def test_round_trip_and_conversion_of_a_conversion(tmp_path: Path) -> None:
    for index in range(5):
        put(tmp_path / "s", f"class{index % 2}/{index}.png", picture(16, 16))
    how = Conversion("lanczos", 8)
    convert(tmp_path / "s", tmp_path / "a.zip", how)
    convert(tmp_path / "s", tmp_path / "b.zip", how)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    convert(tmp_path / "a.zip", tmp_path / "c.zip", Conversion())
    one, two = open_dataset(tmp_path / "a.zip"), open_dataset(tmp_path / "c.zip")
    assert np.array_equal(one.images(np.arange(5)), two.images(np.arange(5)))
    assert one.labels is not None and two.labels is not None
    assert one.labels.tolist() == two.labels.tolist() == [0, 0, 0, 1, 1]
    for dataset in (one, two):
        assert dataset.provenance()["resampling"].startswith("lanczos to 8 (Pillow ")


def test_vector_labels_and_subsets_travel(tmp_path: Path) -> None:
    for index in range(6):
        put(tmp_path / "s", f"{index}.png", np.full((4, 4, 3), index, np.uint8))
    labels = [[f"{index}.png", [index, 0.25]] for index in range(6)]
    (tmp_path / "s/dataset.json").write_text(json.dumps({"labels": labels}))
    convert(tmp_path / "s", tmp_path / "a.zip", Conversion(max_images=3))
    dataset = open_dataset(tmp_path / "a.zip")
    assert dataset.labels is not None and dataset.labels.shape == (3, 2)
    assert np.array_equal(dataset.labels[:, 0], dataset.images(np.arange(3))[:, 0, 0, 0])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    put(tmp_path / "s", "a.png", picture(4, 4))
    name = "b.jpg" if mode == "CMYK" else "b.png"
    put(tmp_path / "s", name, np.full((4, 4, 3), 255, np.uint8), mode)
    convert(tmp_path / "s", tmp_path / "a.zip", Conversion())
    dataset = open_dataset(tmp_path / "a.zip")
    assert dataset.channels == 3 and dataset.images(np.array([1])).min() == 255


def test_grey_on_request(tmp_path: Path) -> None:
    put(tmp_path / "s", "a.png", np.full((4, 4, 3), (255, 0, 0), np.uint8))
    convert(tmp_path / "s", tmp_path / "a.zip", Conversion(channels=1))
    image = open_dataset(tmp_path / "a.zip").images(np.array([0]))
    assert image.shape == (1, 1, 4, 4) and (image == 76).all()  # 0.299 of 255


def test_label_rules(tmp_path: Path) -> None:
    for name in ("00000/a.png", "00001/b.png"):
        put(tmp_path / "s", name, picture(4, 4))
    for rule, expected in (("source", None), ("none", None), ("from-folders", [0, 1])):
        convert(tmp_path / "s", tmp_path / f"{rule}.zip", Conversion(labels=rule))
        labels = open_dataset(tmp_path / f"{rule}.zip").labels
        assert (None if labels is None else labels.tolist()) == expected
    put(tmp_path / "s", "root.png", picture(4, 4))
    with pytest.raises(UserError, match=r"image 'root\.png' in no class folder"):
        convert(tmp_path / "s", tmp_path / "x.zip", Conversion(labels="from-folders"))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (Conversion(), "image of 6 x 4, entry 'b.png'"),
        (Conversion(resolution=8), "image of 4 x 4, entry 'a.png'"),
        (Conversion("lanczos", 2), "image of 6 x 4, entry 'b.png'"),
        (Conversion("lanczos"), "transform lanczos without a resolution"),
        (Conversion("lanczos", 0), "resolution 0"),
        (Conversion(max_images=0), "max_images 0"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path: Path, how: Conversion, said: str) -> None:
    put(tmp_path / "s", "a.png", picture(4, 4))
    put(tmp_path / "s", "b.png", picture(6, 4))
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "s", tmp_path / "x.zip", how)
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_targets_that_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "s", "a.png", picture(4, 4))
    (tmp_path / "old.zip").write_text("precious")
    with pytest.raises(UserError, match=r"old\.zip exists"):
        convert(tmp_path / "s", tmp_path / "old.zip", Conversion())
    assert (tmp_path / "old.zip").read_text() == "precious"
    with pytest.raises(UserError, match=r"ending in \.zip"):
        convert(tmp_path / "s", tmp_path / "out", Conversion())


def test_sixteen_bits_and_damage_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "s", "a.png", np.zeros((4, 4), np.uint16))
    with pytest.raises(UserError, match=r"16-bit image, entry 'a\.png'"):
        convert(tmp_path / "s", tmp_path / "x.zip", Conversion())
    put(tmp_path / "t", "a.png", picture(64, 64))
    data = (tmp_path / "t/a.png").read_bytes()
    (tmp_path / "t/a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"corrupt image .*, entry 'a\.png'"):
        convert(tmp_path / "t", tmp_path / "x.zip", Conversion())
