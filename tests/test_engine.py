"""precision and arithmetic, made effective part by part."""

from collections.abc import Iterator

import pytest
import torch

from fastgan import config as cfg
from fastgan.common.errors import UserError
from fastgan.common.precision import strict_within
from fastgan.launch.cli import compose
from fastgan.launch.engine import arithmetic, make_step, prepare_process, step_settings
from tests.training.toys import ALONE, diffusion_heads, generator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16


def config(*overrides: str) -> cfg.TrainConfig:
    return compose("train", cfg.TrainConfig, ["experiment=demo", "run_dir=unused", *overrides])


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    with strict_within():
        yield
    torch.backends.cudnn.benchmark = before


def allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


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


def test_float32_is_of_one_kind() -> None:
    with pytest.raises(UserError, match=r"arithmetic\.backbones=fp32 beside tf32.* would be right"):
        arithmetic(config("arithmetic.heads=tf32"), CUDA)


def test_replaced_gradients_leave_nothing_to_scale_by() -> None:
    with pytest.raises(UserError, match=r"nonfinite=published.*nonfinite=skip or bf16 would"):
        arithmetic(config("arithmetic.heads=fp16", "nonfinite=published"), CPU)


def test_tf32_is_set_for_the_process_and_not_while_measuring() -> None:
    prepare_process(config("precision=bf16", "arithmetic.heads=tf32"), CPU)
    assert allowed() == (True, True)
    with strict_within():
        assert allowed() == (False, False)
    assert allowed() == (True, True)
    prepare_process(config(), CPU)
    assert allowed() == (False, False)


@pytest.mark.parametrize("part", ["generator", "backbones", "heads"])
def test_a_step_in_float16_gets_the_gradients_of_float32(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that float16 itself could not hold: of a loss a millionth as large."""

    def gradients(*overrides: str) -> dict[str, torch.Tensor]:
        c = config("batch=4", *overrides)
        network = generator().float()
        objects = network, diffusion_heads(network), ALONE
        step = make_step(c, step_settings(c, ALONE), *objects)
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
