"""The command tools/dataset.py, as users call it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.common.errors import run_command
from tests.command_line import Ended
from tools import dataset

RNG = np.random.default_rng(17)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    def called(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["dataset.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_command(dataset.main)
        return Ended(end.value.code, *capsys.readouterr())

    return called


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six 12 x 10 pictures in class folders ape (2), bee (1) and cow (3)."""
    root = tmp_path / "pictures"
    for name in ("ape/1", "ape/2", "bee/3", "cow/4", "cow/5", "cow/6"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = RNG.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


def test_convert_then_info_check_and_grid(run, pictures: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.zip"
    done = run("convert", pictures, target, "--resolution", 8, "--transform", "center-crop")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"6 images in {target}\n"

    told = dict(line.split(": ", 1) for line in run("info", target).out.splitlines())
    assert (told["n"], told["resolution"], told["channels"]) == ("6", "8", "3")
    assert (told["label_dim"], told["classes"]) == ("3", "0:2 1:1 2:3")
    assert told["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert told["resampling"].startswith("center-crop to 8")

    checked = run("check", target)
    assert (checked.code, checked.out) == (0, "6 images, 0 problems\n")

    assert run("grid", target, tmp_path / "grid.png").code == 0
    assert Image.open(tmp_path / "grid.png").size == (6 * 8, 8)
    assert run("grid", "digits", tmp_path / "grid.png").code == 0
    assert Image.open(tmp_path / "grid.png").size == (16 * 16, 8 * 16)


def test_info_without_labels(run, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    told = run("info", tmp_path).out
    assert "classes: unlabelled" in told and "label_dim: 0" in told and "sha256: " not in told


def test_a_refused_conversion_leaves_no_file(run, pictures: Path, tmp_path: Path) -> None:
    done = run("convert", pictures, tmp_path / "out.zip")
    assert done.code == 1 and "image of 12 x 10, entry 'ape/1.png'" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_check_lists_every_problem(run, tmp_path: Path) -> None:
    for index in range(5):
        pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "0.png").write_bytes(b"broken first")
    Image.new("RGB", (4, 4)).save(tmp_path / "2.png")
    Image.new("L", (8, 8)).save(tmp_path / "4.png")
    done = run("check", tmp_path)
    lines = done.out.splitlines()
    assert done.code == 1 and len(lines) == 4 and lines[3] == "5 images, 3 problems"
    for line, name, said in zip(
        lines, ("0.png", "2.png", "4.png"), ("unreadable", "4 x 4", "mode L"), strict=False
    ):
        assert f"entry '{name}'" in line and said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "missing.zip"], "no dataset at missing.zip"),
        (["check", "missing.zip"], "no dataset at missing.zip"),
        (["grid", "missing.zip", "x.png"], "no dataset at missing.zip"),
        (["convert", "missing", "x.zip"], "no dataset at missing"),
        (["convert", "missing", "x.zip", "--transform", "stretch"], "invalid choice: 'stretch'"),
        (["convert", "missing", "x.zip", "--resolution", "big"], "invalid int value: 'big'"),
        (["destroy"], "invalid choice: 'destroy'"),
        ([], "the following arguments are required"),
    ],
)
def test_errors_are_one_line(run, arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("error: ") and said in done.err
    assert done.err.count("\n") == 1
