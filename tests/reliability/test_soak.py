"""The soak: it kills, asks, restarts until the end, and tells equal from different."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgan.checkpoint.store import Checkpoint, save_checkpoint
from fastgan.common.errors import UserError
from tests.conftest import TINY, live_network
from tests.processes import ROOT
from tests.reliability.soak import differences, soak

# Trains by copying the checkpoints of a bank, a tenth of a second each.
FAKE = """
import os, shutil, signal, sys, time
from pathlib import Path
bank, run, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
latest = run / "checkpoints/latest"
names = sorted(path.name for path in bank.iterdir() if path.is_dir())
done = names.index(latest.read_text()) + 1 if latest.exists() else 0
time.sleep(0.1)
resumed = done > 0
if resumed and how == "fails":
    sys.exit(4)
with (run / "log.txt").open("a") as log:
    log.write("first iteration\\n")
for name in names[done:]:
    time.sleep(0.1)
    aside, target = run / f"checkpoints/.{name}.part", run / "checkpoints" / name
    shutil.rmtree(aside, ignore_errors=True)
    wrong = resumed and how == "forgets"
    shutil.copytree(bank / (names[0] if wrong else name), aside)
    aside.rename(target)
    (run / "new").write_text(name)
    (run / "new").replace(latest)
    if asked:
        sys.exit(1 if how == "refuses" else 75)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], Callable[[Path], list[str]]]:
    """how -> a trainer: does it well, forgets what it was, fails on resuming, refuses to stop."""
    average = live_network(TINY).state_dict()
    for nimg in range(4, 44, 4):
        training = {"generator/w": torch.full((3,), float(nimg))}
        checkpoint = Checkpoint(dict(TINY), average, training, nimg, nimg // 4, {}, {})
        save_checkpoint(tmp_path / "bank", checkpoint, keep=100)
    (tmp_path / "fake.py").write_text(FAKE)
    start = [sys.executable, str(tmp_path / "fake.py"), str(tmp_path / "bank")]
    return lambda how: lambda run_dir: [*start, str(run_dir), how]


def test_goes_on_until_it_is_done(fake, tmp_path: Path) -> None:
    found = soak(fake("well"), tmp_path / "out", seed=0, longest=0.3)
    assert found.equal and found.different == []
    assert found.kills > 1 and found.preemptions > 0 and found.kills_while_starting > 0
    assert found.starts == found.kills + found.preemptions + 1
    assert 1 < found.checkpoints_resumed < 10


def test_starts_get_longer_where_they_get_nowhere(fake, tmp_path: Path) -> None:
    found = soak(fake("well"), tmp_path / "out", seed=1, longest=0.01)
    assert found.equal and found.starts > 5


def test_tells_what_is_different(fake, tmp_path: Path) -> None:
    found = soak(fake("forgets"), tmp_path / "out", seed=0, longest=0.3)
    assert not found.equal
    assert found.different == ["nimg", "iteration", "training/generator/w"]


@pytest.mark.parametrize(
    ("how", "told"),
    [("fails", "ended with 4 instead of 0"), ("refuses", "ended with 1 instead of 75")],
)
def test_a_run_that_fails_by_itself(how: str, told: str, fake, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        soak(fake(how), tmp_path / "out", seed=0, longest=0.3)


def test_starts_from_nothing(fake, tmp_path: Path) -> None:
    (tmp_path / "out/killed").mkdir(parents=True)
    with pytest.raises(UserError, match="exists, a soak starts from nothing"):
        soak(fake("well"), tmp_path / "out", seed=0, longest=0.3)


@pytest.mark.parametrize("changed", ["value", "sign of zero", "dtype", "name", "nimg"])
def test_a_single_bit_is_different(changed: str, tmp_path: Path) -> None:
    def save(folder: str, training: dict[str, torch.Tensor], nimg: int = 4) -> Path:
        average = live_network(TINY).state_dict()
        state = Checkpoint(dict(TINY), average, training, nimg, 1, {}, {})
        return save_checkpoint(tmp_path / folder, state, keep=1)

    tensor = torch.tensor([0.0, 1.0, torch.nan])
    one = save("one", {"a": tensor})
    assert differences(one, save("same", {"a": tensor.clone()})) == []
    other = {
        "value": lambda: save("other", {"a": tensor.nextafter(torch.tensor(2.0))}),
        "sign of zero": lambda: save("other", {"a": tensor * torch.tensor([-1.0, 1.0, 1.0])}),
        "dtype": lambda: save("other", {"a": tensor.double()}),
        "name": lambda: save("other", {"b": tensor}),
        "nimg": lambda: save("other", {"a": tensor}, 8),
    }[changed]()
    expected = {"name": ["training/a", "training/b"], "nimg": ["nimg"]}
    assert differences(one, other) == expected.get(changed, ["training/a"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_killed_at_random(tmp_path: Path) -> None:
    overrides = ["experiment=demo", "batch=8", "total_images=1600", "snapshot=160", "tick=160"]
    command = [sys.executable, "tools/soak.py", "--out", str(tmp_path / "soak"), "--longest", "3"]
    ended = subprocess.run(
        [*command, "--", *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told == json.loads((tmp_path / "soak/soak.json").read_text())
    assert told["equal"] and told["kills"] > 0 and told["checkpoints_resumed"] > 1
    assert str(tmp_path) not in ended.stdout
