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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Both wheels by name: the folder that each is installed into, and what it holds."""
    wheels, found = tmp_path_factory.mktemp("wheels"), {}
    sources = (str(ROOT), str(ROOT / "kernels"))
    run(wheels, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels), *sources)
    for name in ("fastgan", "fastgan_kernels"):
        (wheel,) = wheels.glob(f"{name}-*.whl")
        target = tmp_path_factory.mktemp(name)
        install = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target))
        run(wheels, *install, str(wheel))
        found[name] = target, zipfile.ZipFile(wheel).namelist()
    return found


@pytest.mark.slow
def test_the_installed_package_trains_elsewhere(
    installed: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    target, names = installed["fastgan"]
    for expected in ("configs/train", "configs/experiment/demo", "configs/recipe/cifar10"):
        assert f"fastgan/{expected}.yaml" in names
    assert {f"fastgan/assets/digits/{n}.safetensors" for n in ("edm", "classifier")} <= set(names)
    assert "fastgan/run_report/page.html.j2" in names
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"fastgan", "fastgan_kernels"}

    where = run(tmp_path, "-c", "import fastgan; print(fastgan.__file__)", path=target)
    assert Path(where.strip()).is_relative_to(target)
    train = ("-m", "fastgan.train", "experiment=demo")
    assert "digits/train (997)" in run(tmp_path, *train, "dry_run=true", path=target)
    assert os.listdir(tmp_path) == []
    run(tmp_path, *train, "batch=2", "total_images=4", "run_dir=run", path=target)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "done"
    run(tmp_path, "-m", "fastgan.sample", "checkpoint=run", "out=a.png", "device=cpu", path=target)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "run"]


@pytest.mark.slow
def test_beside_another_package_named_kernels(
    installed: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    """Hugging Face's: each is imported by its own name."""
    target, _ = installed["fastgan"]
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    program = (
        "import sys; sys.path.insert(1, sys.argv[1])\n"
        "import kernels, fastgan.train, fastgan_kernels\n"
        "print(kernels.get_kernel.__name__, kernels.__file__, fastgan_kernels.__file__)"
    )
    name, theirs, ours = run(tmp_path, "-c", program, str(target), path=tmp_path).split()
    assert name == "get_kernel"
    assert Path(theirs).is_relative_to(tmp_path) and Path(ours).is_relative_to(target)


@pytest.mark.slow
def test_the_kernels_alone(installed: dict[str, tuple[Path, list[str]]], tmp_path: Path) -> None:
    """Every module imports, and an op runs, without fastgan."""
    target, names = installed["fastgan_kernels"]
    assert not any(name.startswith("fastgan/") for name in names)
    program = (
        "import pkgutil, sys, torch, fastgan_kernels as k\n"
        "sys.modules['fastgan'] = None\n"
        "for module in pkgutil.walk_packages(k.__path__, 'fastgan_kernels.'):\n"
        "    __import__(module.name)\n"
        "print(k.__file__, *k.group_norm_silu(torch.randn(1, 8, 4, 4), 2).shape)"
    )
    where, *shape = run(tmp_path, "-c", program, path=target).split()
    assert Path(where).is_relative_to(target) and shape == ["1", "8", "4", "4"]
