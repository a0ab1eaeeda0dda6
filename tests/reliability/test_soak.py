"""The demo killed at random until it is done, and the same run left alone: the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgan.checkpoint.store import Checkpoint, latest_checkpoint, save_checkpoint
from fastgan.training.resume import PREEMPTED
from tests.conftest import TINY, live_network
from tests.processes import ROOT
from tests.reliability.same import differences

# How often a start is killed outright, asked to stop (in either way), killed while it starts.
ENDINGS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, None)
WEIGHTS = (10, 2, 2, 2)


class Started(subprocess.Popen[bytes]):
    """A command, with what it prints in a file beside its run directory; killed at the end."""

    def __init__(self, command: list[str], run_dir: Path) -> None:
        self.run_dir, self.log = run_dir, run_dir / "log.txt"
        self.before = self.log.stat().st_size if self.log.exists() else 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [word.replace("RUN_DIR", str(run_dir)) for word in command]
        with run_dir.with_suffix(".printed").open("ab") as printed:
            super().__init__(command, stdout=printed, stderr=printed, cwd=ROOT, env=environment)

    def __exit__(self, *reason: Any) -> None:
        self.kill()
        super().__exit__(*reason)

    def first_iteration(self) -> float:
        """Waits until the log tells of one, or the end; seconds it took."""
        begun = time.monotonic()
        while self.poll() is None:
            if self.log.exists() and b"first iteration" in self.log.read_bytes()[self.before :]:
                break
            time.sleep(0.05)
        return time.monotonic() - begun

    def patiently(self, seconds: float) -> int | None:
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def soak(command: list[str], out: Path, longest: float) -> Counter:
    """Runs the command in RUN_DIR = OUT/undisturbed and, killed, OUT/killed until both are done.

    Each start is left alone for a random time of at most `longest` seconds after its first
    iteration, which grow by a tenth each time. Asked to stop by SIGTERM or SIGUSR1, it must exit
    with 75. How often it was ended in which way.
    """
    undisturbed, killed = out / "undisturbed", out / "killed"
    found, chance = Counter(), random.Random(0)
    with Started(command, undisturbed) as alone:
        start_up = alone.first_iteration()
        status = None
        while status != 0:
            with Started(command, killed) as process:
                (how,) = chance.choices(ENDINGS, WEIGHTS)
                after, longest = chance.random(), 1.1 * longest
                if how is not None:
                    process.first_iteration()
                status = process.patiently(after * (longest if how else start_up))
                if status is None:
                    process.send_signal(how or signal.SIGKILL)
                    status = process.wait(120)
                    found["starting" if how is None else how.name] += status != 0
                    expected = PREEMPTED if how in ENDINGS[1:3] else -signal.SIGKILL
                    assert status in (0, expected), (how, killed.with_suffix(".printed"))
                assert status in (0, PREEMPTED, -signal.SIGKILL), killed.with_suffix(".printed")
        assert alone.wait() == 0
    return found


def last(run_dir: Path) -> Path:
    found = latest_checkpoint(run_dir / "checkpoints")
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_killed_at_random(tmp_path: Path) -> None:
    small = ["experiment=demo", "batch=8", "total_images=1600", "snapshot=160", "tick=160"]
    command = [sys.executable, "-m", "fastgan.train", *small, "run_dir=RUN_DIR"]
    found = soak(command, tmp_path, 3)
    assert found["SIGKILL"] > 1 and found.total() > 3, found
    assert differences(last(tmp_path / "undisturbed"), last(tmp_path / "killed")) == []


# Trains by copying the checkpoints of a bank, a tenth of a second each.
FAKE = """
import shutil, signal, sys, time
from pathlib import Path
bank, how, run = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
latest = run / "checkpoints/latest"
names = sorted(path.name for path in bank.iterdir() if path.is_dir())
done = names.index(latest.read_text()) + 1 if latest.exists() else 0
with (run / "log.txt").open("a") as log:
    log.write("first iteration\\n")
for name in names[done:]:
    time.sleep(0.1)
    wrong = done > 0 and how == "forgets"
    shutil.rmtree(run / "checkpoints" / name, ignore_errors=True)
    shutil.copytree(bank / (names[0] if wrong else name), run / "checkpoints" / name)
    (run / "new").write_text(name)
    (run / "new").replace(latest)
    if asked:
        sys.exit(1 if how == "refuses" else 75)
"""


def checkpoint(folder: Path, training: dict[str, torch.Tensor], nimg: int = 4) -> Path:
    average = live_network(TINY).state_dict()
    return save_checkpoint(
        folder, Checkpoint(dict(TINY), average, training, nimg, 1, {}, {}), keep=100
    )


@pytest.mark.parametrize("how", ["well", "forgets", "refuses"])
def test_it_goes_on_until_it_is_done_and_tells_what_is_wrong(how: str, tmp_path: Path) -> None:
    for nimg in range(4, 44, 4):
        checkpoint(tmp_path / "bank", {"generator/w": torch.full((3,), float(nimg))}, nimg)
    command = [sys.executable, "-c", FAKE, str(tmp_path / "bank"), how, "RUN_DIR"]
    if how == "refuses":
        with pytest.raises(AssertionError, match=r"killed\.printed"):
            soak(command, tmp_path, 0.3)
        return
    found = soak(command, tmp_path, 0.3)
    assert found["SIGKILL"] > 1 and found["SIGTERM"] + found["SIGUSR1"] > 0, found
    wrong = ["nimg", "training/generator/w"] if how == "forgets" else []
    assert differences(last(tmp_path / "undisturbed"), last(tmp_path / "killed")) == wrong


@pytest.mark.parametrize("changed", ["nothing", "value", "sign of zero", "dtype", "name", "nimg"])
def test_a_single_bit_is_different(changed: str, tmp_path: Path) -> None:
    tensor = torch.tensor([0.0, 1.0, torch.nan])
    other = {
        "value": tensor.nextafter(torch.tensor(2.0)),
        "sign of zero": tensor * torch.tensor([-1.0, 1.0, 1.0]),
        "dtype": tensor.double(),
    }.get(changed, tensor.clone())
    one = checkpoint(tmp_path / "one", {"a": tensor})
    name, nimg = "b" if changed == "name" else "a", 8 if changed == "nimg" else 4
    expected = {"nothing": [], "name": ["training/a", "training/b"], "nimg": ["nimg"]}
    found = differences(one, checkpoint(tmp_path / "other", {name: other}, nimg))
    assert found == expected.get(changed, ["training/a"])
