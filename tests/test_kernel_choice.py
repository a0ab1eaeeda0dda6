"""kernels= and FASTGAN_KERNELS as a user meets them, and the package of the same name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastgan_kernels import dispatch

from fastgan.common.errors import UserError
from fastgan.launch.engine import select_kernels

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_configured", "auto")


@pytest.mark.parametrize("setting", ["auto", "library", "reference", "triton"])
def test_what_can_run_is_taken(setting: str) -> None:
    select_kernels(setting, CPU)
    expected = "reference" if setting == "auto" else setting
    assert dispatch.implementation("group_norm_silu", "cpu", torch.float32) == expected


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("fast", "no 'fast', in FASTGAN_KERNELS=fast, one of auto, triton, library, reference"),
        ("conv=library", "no op 'conv', in FASTGAN_KERNELS=conv=library, one of group_norm_silu"),
        ("attention=xformers", "attention cannot run as xformers"),
    ],
)
def test_a_wrong_variable_is_named(
    variable: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, variable)
    with pytest.raises(UserError, match=message) as caught:
        select_kernels("auto", CPU)
    assert "\n" not in str(caught.value)


def test_triton_on_a_cpu_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastgan.train", "experiment=demo", "kernels=triton"]
    command += ["device=cpu", f"run_dir={tmp_path / 'run'}"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr.splitlines() == [
        "error: group_norm_silu cannot run as triton (CPU tensors need TRITON_INTERPRET=1), as "
        "kernels=triton asks, reference or auto would"
    ]


def test_another_package_named_kernels_is_told_apart(tmp_path: Path) -> None:
    """Hugging Face's, for instance, when it comes first on the path."""
    (tmp_path / "kernels/fastgan_kernels/__init__.py").write_text("def get_kernel(): ...\n")
    environment = dict(os.environ, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    command = [sys.executable, "-c", "import fastgan"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert (
        "another package named kernels" in last
        and str(tmp_path / "kernels/fastgan_kernels/__init__.py") in last
    )
