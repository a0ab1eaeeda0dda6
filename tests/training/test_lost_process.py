"""A process that dies, hangs or drifts ends the run in bounded time, and says so."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgan.common import distributed
from fastgan.common.errors import run_command
from fastgan.training.loop import Schedule, run_loop
from tests.conftest import TINY
from tests.processes import two_processes
from tests.training.toys import gan_step, reals

_WORKER = "from tests.training.test_lost_process import worker; worker()"
PATIENCE = 5.0


def worker() -> None:
    """Trains; in iteration 3 the second process dies, waits too long, or changes a parameter."""
    torch.set_num_threads(1)
    how, run_dir = sys.argv[1], Path(sys.argv[2])
    world = distributed.init("cpu", PATIENCE)
    step = gan_step(world=world, batch_gpu=2)

    def draw(iteration: int) -> tuple[torch.Tensor, None]:
        if (world.rank, iteration) == (1, 3):
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hang":
                time.sleep(3 * PATIENCE)
                os._exit(7)
            step.update_g.parameters[-1].data += 1e-12
        return reals(iteration).chunk(2)[world.rank], None

    def train() -> None:
        run_loop(
            step,
            draw,
            Schedule(4, 4000, tick=8, snapshot=8, keep=2),
            run_dir,
            world,
            network_config=dict(TINY),
            provenance={"license": "test"},
            evaluate=lambda network, nimg: {},
        )

    run_command(train)


@pytest.mark.parametrize(
    ("how", "status", "most"), [("die", -signal.SIGKILL, PATIENCE), ("hang", 7, 2 * PATIENCE)]
)
def test_the_others_end_and_say_so(how: str, status: int, most: float, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    errors = two_processes(_WORKER, how, str(tmp_path), timeout=60, expected=(1, status))
    line = errors[0].splitlines()[-1]
    assert line.startswith("error: process 0 of 2 lost another one (") and "Traceback" not in line
    assert "Traceback" not in errors[0]
    told = json.loads((tmp_path / "state.json").read_text())
    assert (told["status"], told["exit_code"]) == ("failed", 1)
    assert told["message"] in line
    # One snapshot was due before, and is whole.
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "0000000008"
    ticked = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[-1])["timestamp"]
    assert (tmp_path / "state.json").stat().st_mtime - ticked < most


def test_processes_that_drift_apart_end(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    errors = two_processes(_WORKER, "drift", str(tmp_path), timeout=60, expected=1)
    for said in errors:
        line = said.splitlines()[-1]
        assert line.startswith("error: processes hold different parameters, at 16 images")
    assert json.loads((tmp_path / "state.json").read_text())["status"] == "failed"
