"""generator.checkpoint=true: an iteration, recorded or not, and a training give the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgan.common.errors import UserError
from fastgan.launch.run_dir import open_run_dir
from fastgan.models.unet_block import UNetBlock, recompute_blocks
from fastgan.performance.iteration import iteration_flop
from fastgan.performance.live_step import live_step, measured_config, tiny_overrides
from fastgan.training.compiled import CompiledStep
from fastgan.training.fast import WARMUP, FastStep
from fastgan.training.step import PlainStep
from tests.command_line import CommandLine
from tests.training.tape import TapedStep
from tests.training.toys import assert_same, everything, gan_step, reals

CHECKPOINT = "generator.checkpoint=true"


def after(
    iterations: int, kind: type[PlainStep], recomputed: bool, **changes: Any
) -> dict[str, Tensor]:
    step = gan_step(kind=kind, augment=("color",), **changes)
    if recomputed:
        recompute_blocks(step.generator)
    for k in range(iterations):
        step.run(reals(k), None, k)
    return everything(step)


@pytest.mark.parametrize(
    ("changes", "iterations"),
    [({"r1_interval": 2}, 2 * WARMUP + 5), ({"batch_gpu": 2, "steps": 2}, WARMUP + 3)],
)
def test_iterations_and_their_recordings(changes: dict[str, Any], iterations: int) -> None:
    """A recording refuses whatever reads a value on the host."""
    expected = after(iterations, PlainStep, False, **changes)
    assert_same(after(iterations, PlainStep, True, **changes), expected)
    assert_same(after(iterations, TapedStep, True, **changes), expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [CompiledStep, FastStep])
def test_compiled_iterations(
    kind: type[CompiledStep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert_same(after(4, kind, True), after(4, PlainStep, False), atol=1e-6)


def test_the_generator_alone_is_computed_again() -> None:
    """Not the encoder that the discriminator copied from it."""
    config = measured_config("demo", [*tiny_overrides("demo"), "device=cpu", CHECKPOINT])
    step = live_step(config, torch.device("cpu")).step
    parts = {"G": step.generator, "D": step.discriminator}
    blocks = {n: [m for m in p.modules() if isinstance(m, UNetBlock)] for n, p in parts.items()}
    assert blocks["G"] and all(block.recomputed for block in blocks["G"])
    assert blocks["D"] and not any(block.recomputed for block in blocks["D"])


def test_it_counts_for_no_useful_work() -> None:
    configs = [
        measured_config("demo", [*tiny_overrides("demo"), *more]) for more in ([], [CHECKPOINT])
    ]
    assert configs[1].generator.checkpoint and not configs[0].generator.checkpoint
    assert iteration_flop(configs[0]) == iteration_flop(configs[1])


def tensors(run_dir: str, nimg: int) -> dict[str, Tensor]:
    folder = Path(run_dir, "checkpoints", f"{nimg:010d}")
    files = ("ema.safetensors", "training.safetensors")
    return {f"{file}/{n}": t for file in files for n, t in load_file(folder / file).items()}


def test_a_training_and_its_resumption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = CommandLine(tmp_path / "here", capsys, monkeypatch)
    small = ("experiment=demo", "batch=4", "tick=8", "snapshot=4", "data.workers=0")
    for name, first, then in (("plain", "false", "false"), ("again", "true", "false")):
        for images, value in ((4, first), (8, then)):
            more = (f"run_dir={name}", f"total_images={images}", f"generator.checkpoint={value}")
            ended = command("train", *small, *more)
            assert ended.code == 0, ended
    assert_same(tensors("plain", 8), tensors("again", 8))


def test_another_key_of_the_generator_is_still_refused(tmp_path: Path) -> None:
    config = measured_config("demo", [f"run_dir={tmp_path}"])
    open_run_dir(config)
    config.generator.checkpoint = True
    open_run_dir(config)
    config.generator.steps = 2
    with pytest.raises(UserError, match=r"generator.steps=1 \(not 2\)"):
        open_run_dir(config)
