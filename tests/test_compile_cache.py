"""The compile caches: where they are, who decides, what is refused."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from fastgan_kernels import dispatch

from fastgan.common.errors import UserError
from fastgan.launch.engine import FOLDERS, prepare_compiler, select_kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in FOLDERS:
        # Set first, so that what the code sets is taken back at the end.
        monkeypatch.setenv(variable, "unset")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(dispatch, "_configured", "auto")


def test_one_folder_for_all_runs(tmp_path: Path) -> None:
    root = prepare_compiler(None, CPU)
    assert root == tmp_path / "home/fastgan"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(root / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(root / "triton")
    assert (root / "inductor").stat().st_mode & 0o777 == 0o700


def test_the_configuration_names_another_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    prepare_compiler(str(tmp_path / "shared"), CPU)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "shared/inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"compile cache cannot be written .*compile\.cache=FOLDER"):
        prepare_compiler(str(tmp_path / "file"), CPU)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no C\\+\\+ compiler, on PATH"):
        prepare_compiler(str(tmp_path), CPU)


def test_auto_leaves_fusion_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    select_kernels("auto", CPU, compiled=True)
    assert dispatch.choose("group_norm_silu", "cuda", torch.bfloat16).implementation == "reference"
    assert dispatch.choose("attention", "cuda", torch.bfloat16).implementation == "library"
    select_kernels("library", CPU, compiled=True)
    assert dispatch.choose("group_norm_silu", "cuda", torch.bfloat16).implementation == "library"
