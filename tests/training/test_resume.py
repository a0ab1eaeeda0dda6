"""Where a run is taken up again: the newest checkpoint that is whole and its own."""

import shutil
from pathlib import Path

import pytest
import torch

from fastgan.common.errors import UserError
from fastgan.training.loop import Schedule, run_loop
from fastgan.training.step import PlainStep
from tests.conftest import TINY
from tests.training.toys import ALONE, assert_same, everything, gan_step, reals

NEWEST, OLDER = "0000000032", "0000000016"


def train(step: PlainStep, run_dir: Path, total: int) -> list[str]:
    """Iterations of four images, a checkpoint after every sixteen; returns the log."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    run_loop(
        step,
        lambda k: (reals(k), None),
        Schedule(4, total, tick=16, snapshot=16, keep=3),
        run_dir,
        ALONE,
        network_config=dict(TINY),
        provenance={"license": "test"},
        evaluate=lambda network, nimg: {},
    )
    return (run_dir / "log.txt").read_text().splitlines()


def truncate(checkpoints: Path) -> None:
    file = checkpoints / NEWEST / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def flip_a_bit(checkpoints: Path) -> None:
    file = checkpoints / NEWEST / "training.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)


def lose_a_file(checkpoints: Path) -> None:
    (checkpoints / NEWEST / "ema.safetensors").unlink()


def forget_the_facts(checkpoints: Path) -> None:
    (checkpoints / NEWEST / "meta.json").write_text("{}")


def somebody_elses(checkpoints: Path) -> None:
    """Of a run in which everything trains."""
    other = checkpoints.parent.parent / "other"
    train(gan_step(level=0), other, 32)
    shutil.rmtree(checkpoints / NEWEST)
    shutil.copytree(other / "checkpoints" / NEWEST, checkpoints / NEWEST)


def lose_the_folder(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / NEWEST)


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, lose_a_file, forget_the_facts, somebody_elses]
)
def test_goes_on_from_the_one_before_and_says_so(damage, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(gan_step(), run_dir, 32)
    damage(run_dir / "checkpoints")
    resumed, undisturbed = gan_step(), gan_step()
    log = train(resumed, run_dir, 48)
    left_out = [line for line in log if line.startswith("left out: ")]
    assert len(left_out) == 1 and (NEWEST in left_out[0] or "the checkpoint's" in left_out[0])
    assert any(line.startswith("16 images are trained") for line in log)
    train(undisturbed, tmp_path / "undisturbed", 48)
    assert_same(everything(resumed), everything(undisturbed))


@pytest.mark.parametrize("text", ["", "nothing", "../0000000016", "0000000099"])
def test_a_damaged_pointer_means_the_newest(text: str, tmp_path: Path) -> None:
    train(gan_step(), tmp_path, 32)
    (tmp_path / "checkpoints/latest").write_text(text)
    log = train(gan_step(), tmp_path, 32)
    assert log[-1] == f"32 images are trained in {tmp_path}, nothing left to do"


def test_a_lost_pointer_means_the_newest(tmp_path: Path) -> None:
    train(gan_step(), tmp_path, 32)
    (tmp_path / "checkpoints/latest").unlink()
    assert "32 images are trained" in train(gan_step(), tmp_path, 32)[-1]


def test_a_lost_folder_means_the_one_before(tmp_path: Path) -> None:
    train(gan_step(), tmp_path, 32)
    lose_the_folder(tmp_path / "checkpoints")
    assert any("16 images are trained" in line for line in train(gan_step(), tmp_path, 32))


def test_going_back_by_hand_is_respected(tmp_path: Path) -> None:
    train(gan_step(), tmp_path, 32)
    (tmp_path / "checkpoints/latest").write_text(OLDER)
    assert any("16 images are trained" in line for line in train(gan_step(), tmp_path, 32))


def test_starting_over_would_overwrite_what_is_there(tmp_path: Path) -> None:
    train(gan_step(), tmp_path, 16)
    step = gan_step(level=0)
    before = {n: t.clone() for n, t in everything(step).items()}
    with pytest.raises(UserError, match="trains other parameters"):
        train(step, tmp_path, 32)
    assert all(torch.equal(t, before[n]) for n, t in everything(step).items() if "average" not in n)
