"""What a process computes with: arithmetic part by part, kernels, the compile caches."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastgan_kernels import dispatch

from fastgan import config as cfg
from fastgan.common.errors import UserError
from fastgan.common.precision import strict_within
from fastgan.launch.cli import compose
from fastgan.launch.engine import (
    FOLDERS,
    arithmetic,
    make_step,
    prepare_compiler,
    prepare_process,
    select_kernels,
)
from tests.training.toys import ALONE, diffusion_heads, generator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16


def config(*overrides: str) -> cfg.TrainConfig:
    return compose("train", cfg.TrainConfig, ["experiment=demo", "run_dir=unused", *overrides])


@pytest.fixture(autouse=True)
def settings_restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    for variable in FOLDERS:
        # Set first, so that what the code sets is taken back at the end.
        monkeypatch.setenv(variable, "unset")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(dispatch, "_configured", "auto")
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    with strict_within():
        yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize(
    ("overrides", "device", "expected", "tf32"),
    [
        ([], CPU, (None, None, None), False),
        ([], CUDA, (BF16, None, None), False),
        (["precision=bf16"], CPU, (BF16, BF16, BF16), False),
        (["arithmetic.generator=fp32"], CUDA, (None, None, None), False),
        (["arithmetic.heads=fp16"], CUDA, (BF16, None, FP16), False),
        (["precision=bf16", "arithmetic.heads=fp32"], CUDA, (BF16, BF16, None), False),
        (["precision=bf16", "arithmetic.backbones=tf32"], CUDA, (BF16, None, BF16), True),
        (["arithmetic.heads=tf32", "arithmetic.backbones=fp16"], CUDA, (BF16, FP16, None), True),
    ],
)
def test_parts(overrides: list[str], device: torch.device, expected: tuple, tf32: bool) -> None:
    parts = arithmetic(config(*overrides), device)
    assert (parts.generator, parts.backbones, parts.heads) == expected
    assert parts.tf32 is tf32 and parts.fp16 is (FP16 in expected)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["arithmetic.heads=tf32"], r"arithmetic\.backbones=fp32 beside tf32.* would be right"),
        (
            ["arithmetic.heads=fp16", "nonfinite=published"],
            "nonfinite=published.*nonfinite=skip or bf16 would",
        ),
    ],
)
def test_what_cannot_be(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        arithmetic(config(*overrides), CUDA)


def test_tf32_is_set_for_the_process_and_not_while_measuring() -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    prepare_process(config("precision=bf16", "arithmetic.heads=tf32"), CPU)
    assert allowed() == (True, True) and torch.backends.cudnn.benchmark
    with strict_within():
        assert allowed() == (False, False)
    assert allowed() == (True, True)
    prepare_process(cfg.SampleConfig(), CPU)
    assert allowed() == (False, False)


@pytest.mark.parametrize("part", ["generator", "backbones", "heads"])
def test_a_step_in_float16_gets_the_gradients_of_float32(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that float16 itself could not hold: of a loss a millionth as large."""

    def gradients(*overrides: str) -> dict[str, torch.Tensor]:
        network = generator().float()
        step = make_step(config("batch=4", *overrides), ALONE, network, diffusion_heads(network))
        # As where many patches and images share a loss.
        monkeypatch.setattr(step, "_reduce", lambda loss: 1e-6 * loss.mean())
        found = {}
        for name, update in (("G", step.update_g), ("D", step.update_d)):

            def note(update=update, name=name) -> None:
                found[name] = torch.cat([p.grad.flatten() for p in update.parameters])

            monkeypatch.setattr(update.optimizer, "step", note)
        reals = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
        step.run(reals, None, 1)
        return found

    reference, ours = gradients(), gradients(f"arithmetic.{part}=fp16")
    for name, gradient in reference.items():
        assert gradient.abs().median() < 6e-8  # below the smallest float16
        assert 1e-7 < (ours[name] - gradient).norm() / gradient.norm() < 0.02


def test_one_cache_for_all_runs(tmp_path: Path) -> None:
    root = prepare_compiler(None, CPU)
    assert root == tmp_path / "home/fastgan"
    for variable, name in FOLDERS.items():
        assert os.environ[variable] == str(root / name)
        assert (root / name).stat().st_mode & 0o777 == 0o700


def test_the_configuration_names_another_cache_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    prepare_compiler(str(tmp_path / "shared"), CPU)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "shared/inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_nothing_to_compile_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"compile cache cannot be written .*compile\.cache=FOLDER"):
        prepare_compiler(str(tmp_path / "file"), CPU)
    for variable in FOLDERS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no C\\+\\+ compiler, on PATH"):
        prepare_compiler(str(tmp_path), CPU)


@pytest.mark.parametrize(
    ("setting", "norm", "attention"), [("auto", "reference", "library"), ("library",) * 3]
)
def test_auto_leaves_fusion_to_the_compiler(setting: str, norm: str, attention: str) -> None:
    select_kernels(setting, CPU, compiled=True)
    assert dispatch.choose("group_norm_silu", "cuda", BF16).implementation == norm
    assert dispatch.choose("attention", "cuda", BF16).implementation == attention
