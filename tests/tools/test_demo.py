"""The demo's measure, its tables, and one very short run of all its stages."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgan.data.dataset import Digits
from tools import demo


def test_a_split_is_at_no_distance_from_itself_and_noise_is_far() -> None:
    measure = demo.Measure("val")
    images = torch.from_numpy(Digits("val").all_images)
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0))
    for space, distance in measure(images).items():
        assert abs(distance) < 1e-6, space
    for space, distance in measure(noise.to(torch.uint8)).items():
        assert distance > 50, space
    # A shift of one principal coordinate by one unit adds exactly 1 to the squared distance.
    shifted = measure.extractors["pca"](images).double()
    shifted[:, 3] += 1
    variance = float(measure.reference["pca"][1].trace())
    assert measure.distance("pca", shifted) == pytest.approx(100 / variance, rel=1e-6)


def test_real_images_are_reproducible_training_images() -> None:
    first, second = demo.real_images(), demo.real_images()
    assert torch.equal(first, second) and len(first) == demo.DRAWS * demo.N
    known = {image.tobytes() for image in Digits("train").all_images}
    assert all(image.numpy().tobytes() in known for image in first)


def test_excess_ratio_and_table() -> None:
    numbers = {"real": (1, 2), "untuned": (90, 80), "heun": (3, 6), "d2o_f": (2, 8)}
    rows = {name: {"classifier": c, "pca": p} for name, (c, p) in numbers.items()}
    text = demo.table({"rows": rows, "heun_steps": 18})
    assert "Heun 18 steps" in text and len(text.splitlines()) == 7
    last = [cell.strip() for cell in text.splitlines()[-1].split("|")]
    assert last[1:4] == ["excess over real, D2O-F : Heun", "0.50x", "1.50x"]


def test_all_stages_and_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "N", 40)
    monkeypatch.setattr(demo, "DRAWS", 1)
    monkeypatch.setattr(demo, "HEUN_STEPS", (2, 3))
    monkeypatch.setattr(demo, "SEEDS", (7, 8))
    short = ["batch=8", "total_images=16", "snapshot=16", "tick=8"]
    summary = demo.study(tmp_path, ["d2o"], short)
    result = json.loads((tmp_path / "d2o-7/result.json").read_text())
    assert list(result["rows"]) == ["real", "untuned", "heun", "d2o_f"]
    assert all(set(row) == {"classifier", "pca"} for row in result["rows"].values())
    assert result["rows"]["untuned"]["pca"] > 3 * result["rows"]["real"]["pca"]
    assert result["seeds"] == [7] and result["heun_steps"] in (2, 3) and result["n"] == 40
    width, height = Image.open(tmp_path / "d2o-7/grid.png").size
    assert 4 * 16 * 3 < height < 4 * 16 * 4 and width > demo.COLUMNS * 16 * 3

    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    values = [run["pca"] for run in summary["runs"]["d2o"]]
    assert [run["seed"] for run in summary["runs"]["d2o"]] == [7, 8]
    assert summary["rows"]["d2o"]["pca"]["mean"] == pytest.approx(sum(values) / 2)
    assert "D2O: all parameters" in demo.table(summary) and "+-" in demo.table(summary)
    # A run that is done is not repeated.
    monkeypatch.setattr(demo, "demo", None)
    assert demo.study(tmp_path, ["d2o"], short) == summary
