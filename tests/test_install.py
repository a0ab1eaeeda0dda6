"""A wheel trains from any folder: configurations and assets are inside it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, *arguments: str, path: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_installed_package_trains_elsewhere(tmp_path: Path) -> None:
    wheels, target, folder = (tmp_path / name for name in ("wheels", "target", "elsewhere"))
    folder.mkdir()
    run(tmp_path, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels), str(ROOT))
    (wheel,) = wheels.glob("fastgan-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("configs/train", "configs/experiment/demo", "configs/recipe/cifar10"):
        assert f"fastgan/{expected}.yaml" in names
    assert {f"fastgan/assets/digits/{n}.safetensors" for n in ("edm", "classifier")} <= set(names)
    assert "fastgan/run_report/page.html.j2" in names
    assert not any(name.startswith(("tests/", "tools/", "runs/")) for name in names)
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
    run(tmp_path, *install)

    where = run(folder, "-c", "import fastgan; print(fastgan.__file__)", path=target)
    assert Path(where.strip()).is_relative_to(target)
    train = ("-m", "fastgan.train", "experiment=demo")
    assert "digits/train (997)" in run(folder, *train, "dry_run=true", path=target)
    assert os.listdir(folder) == []
    run(folder, *train, "batch=2", "total_images=4", "run_dir=run", path=target)
    assert json.loads((folder / "run" / "state.json").read_text())["status"] == "done"
    run(folder, "-m", "fastgan.sample", "checkpoint=run", "out=a.png", "device=cpu", path=target)
    assert sorted(os.listdir(folder)) == ["a.png", "run"]
