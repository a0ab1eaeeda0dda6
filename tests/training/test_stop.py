"""Asked to stop: saved by all processes at one iteration, and taken up again as if nothing was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgan.common import distributed
from fastgan.training.loop import Schedule, run_loop
from fastgan.training.resume import PREEMPTED, SIGNALS, Preempted
from fastgan.training.state import StepResult
from fastgan.training.step import PlainStep
from tests.conftest import TINY
from tests.processes import ROOT
from tests.training.toys import ALONE, assert_same, everything, gan_step, reals

TOTAL = 32


def train(step: PlainStep, run_dir: Path, world: distributed.World = ALONE) -> None:
    """Eight iterations of four images; snapshots at the end only."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    own = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    run_loop(
        step,
        lambda k: (reals(k)[own], None),
        Schedule(4, TOTAL, tick=8, snapshot=1000, keep=2),
        run_dir,
        world,
        network_config=dict(TINY),
        provenance={"license": "test"},
        evaluate=lambda network, nimg: {},
    )


def stop_in(step: PlainStep, at: int, number: int) -> None:
    """Sends this process `number` while iteration `at` runs."""
    run = step.run

    def interrupted(images: torch.Tensor, labels: None, iteration: int) -> StepResult:
        if iteration == at:
            os.kill(os.getpid(), number)
        return run(images, labels, iteration)

    step.run = interrupted  # type: ignore[method-assign]


def state(run_dir: Path) -> dict:
    return json.loads((run_dir / "state.json").read_text())


@pytest.mark.parametrize("number", SIGNALS)
def test_saves_and_goes_on_to_the_same_bits(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    stopped = gan_step()
    stop_in(stopped, 3, number)
    with pytest.raises(Preempted, match="saved at 16 images, the same command resumes"):
        train(stopped, tmp_path / "stopped")
    assert signal.getsignal(number) is before
    told = state(tmp_path / "stopped")
    assert (told["status"], told["nimg"], told["exit_code"]) == ("preempted", 16, 75)
    assert (tmp_path / "stopped/checkpoints/latest").read_text().strip() == "0000000016"
    resumed, undisturbed = gan_step(), gan_step()
    train(resumed, tmp_path / "stopped")
    train(undisturbed, tmp_path / "undisturbed")
    assert_same(everything(resumed), everything(undisturbed))
    assert state(tmp_path / "stopped")["status"] == "done"


def test_asked_in_the_last_iteration_it_is_done(tmp_path: Path) -> None:
    step = gan_step()
    stop_in(step, TOTAL // 4 - 1, signal.SIGTERM)
    train(step, tmp_path)
    assert state(tmp_path)["status"] == "done"


def test_the_command_answers_75(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "fastgan.train", "experiment=demo", f"run_dir={run_dir}"]
    process = subprocess.Popen(
        [*command, "batch=2", "snapshot=48k"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    log = run_dir / "log.txt"
    while process.poll() is None and not (log.exists() and "first iteration" in log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == PREEMPTED, error
    assert time.monotonic() - asked < 30
    assert error.splitlines()[-1].startswith("asked to stop, saved at ")
    found = state(run_dir)
    assert found["status"] == "preempted" and found["exit_code"] == PREEMPTED
    assert (run_dir / "checkpoints/latest").read_text().strip() == f"{found['nimg']:010d}"
