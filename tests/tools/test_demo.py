"""The demo's measure, its table, and one very short run of all its stages."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgan.data.dataset import Digits

TOOLS = str(Path(__file__).parents[2] / "tools")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(TOOLS)
    import demo

    yield demo
    sys.modules.pop("demo", None)


def test_a_split_is_at_no_distance_from_itself_and_noise_is_far(demo) -> None:
    measure = demo.Measure("val")
    images = torch.from_numpy(Digits("val").all_images)
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0))
    for space, distance in measure(images).items():
        assert abs(distance) < 1e-6, space
    for space, distance in measure(noise.to(torch.uint8)).items():
        assert distance > 50, space


def test_distances_are_means_over_sets_in_percent_of_variance(demo) -> None:
    measure = demo.Measure("val")
    images = torch.from_numpy(Digits("val").all_images)
    # A shift of one principal coordinate by one unit adds exactly 1 to the squared distance.
    pca = measure.extractors["pca"]
    shifted = {"pca": pca(images).double()}
    shifted["pca"][:, 3] += 1
    variance = float(measure.reference["pca"][1].trace())
    assert measure._distance("pca", shifted["pca"]) == pytest.approx(100 / variance, rel=1e-6)


def test_real_images_are_reproducible_training_images(demo) -> None:
    first, second = demo.real_images(), demo.real_images()
    assert torch.equal(first, second) and len(first) == demo.DRAWS * demo.N
    known = {image.tobytes() for image in Digits("train").all_images}
    assert all(image.numpy().tobytes() in known for image in first)


def test_excess_ratio_and_table(demo) -> None:
    rows = {
        name: {"classifier": c, "pca": p}
        for name, c, p in (
            ("real", 1.0, 2.0),
            ("untuned", 90.0, 80.0),
            ("heun", 3.0, 6.0),
            ("d2o_f", 2.0, 8.0),
        )
    }
    assert demo.excess_ratio(rows, "classifier") == pytest.approx(0.5)
    assert demo.excess_ratio(rows, "pca") == pytest.approx(1.5)
    text = demo.table({"rows": rows, "heun_steps": 18})
    assert "0.50x" in text and "1.50x" in text and "Heun 18" in text and len(text.splitlines()) == 6


def test_all_stages(demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "N", 40)
    monkeypatch.setattr(demo, "DRAWS", 1)
    monkeypatch.setattr(demo, "HEUN_STEPS", (2, 3))
    short = ["total_images=64", "snapshot=64", "tick=32"]
    result = demo.demo(tmp_path, "val", 7, short)
    assert list(result["rows"]) == ["real", "untuned", "heun", "d2o_f"]
    assert all(set(row) == {"classifier", "pca"} for row in result["rows"].values())
    assert result["rows"]["untuned"]["pca"] > 3 * result["rows"]["real"]["pca"]
    assert result["seeds"] == [7] and result["heun_steps"] in (2, 3) and result["n"] == 40
    assert json.loads((tmp_path / "result.json").read_text()) == result
    width, height = Image.open(tmp_path / "grid.png").size
    assert 4 * 16 * 3 < height < 4 * 16 * 4 and width > demo.COLUMNS * 16 * 3
