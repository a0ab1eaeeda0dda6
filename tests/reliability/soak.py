"""A run of training that is killed again and again, against the same run left alone."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan.checkpoint.store import latest_checkpoint, load_checkpoint
from fastgan.common.errors import UserError
from fastgan.common.files import PART
from fastgan.training.resume import PREEMPTED

# How often a start is killed outright, asked to stop (in either way), killed while it starts.
_ENDINGS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, None)
_WEIGHTS = (10, 2, 2, 2)
# Starts in a row that saved nothing unless they were asked to stop, before they get more time.
_PATIENCE = 3
_ANSWER = 120.0  # seconds within which a run that was asked to stop must have ended


@dataclass
class Soak:
    """What happened. `kills` include those while saving and while starting."""

    starts: int = 0
    kills: int = 0
    kills_while_saving: int = 0
    kills_while_starting: int = 0
    preemptions: int = 0
    checkpoints_resumed: int = 0
    """Different ones that a start went on from."""
    seconds: dict[str, float] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    """What of the last checkpoints is not the same, by name."""

    @property
    def equal(self) -> bool:
        return not self.different


def soak(command: Callable[[Path], list[str]], out: Path, *, seed: int, longest: float) -> Soak:
    """Runs `command(run_dir)` in OUT/undisturbed and, killed, in OUT/killed until both are done.

    Each start is left alone for a random time of at most `longest` seconds after its first
    iteration. Nearly every kill is SIGKILL; asked to stop by SIGTERM or SIGUSR1, it must exit with
    75. UserError where a run fails by itself.
    """
    undisturbed, killed = (_new(out / name) for name in ("undisturbed", "killed"))
    begun, found = time.monotonic(), Soak()
    with _started(command(undisturbed), undisturbed) as alone:
        start_up = _first_iteration(alone, undisturbed, begun)
        Disturber(command(killed), killed, found, random.Random(seed), longest, start_up).run()
        found.seconds["killed"] = round(time.monotonic() - begun, 1)
        _require(alone.wait(), 0, undisturbed)
        found.seconds["both"] = round(time.monotonic() - begun, 1)
    found.different = differences(_latest(undisturbed), _latest(killed))
    return found


class Disturber:
    """Starts a command until it is done."""

    def __init__(
        self,
        command: list[str],
        run_dir: Path,
        found: Soak,
        chance: random.Random,
        longest: float,
        start_up: float,
    ) -> None:
        self.command, self.run_dir, self.found = command, run_dir, found
        self.chance, self.longest, self.start_up = chance, longest, start_up

    def run(self) -> None:
        seen, in_vain = {""}, 0
        while True:
            before, asked = _named(self.run_dir), self.found.preemptions
            seen.add(before)
            self.found.starts += 1
            with _started(self.command, self.run_dir) as process:
                if self._disturb(process):
                    break
            saved = _named(self.run_dir) != before and self.found.preemptions == asked
            in_vain = 0 if saved else in_vain + 1
            if in_vain == _PATIENCE:
                self.longest, in_vain = 1.5 * self.longest, 0
        self.found.checkpoints_resumed = len(seen - {""})

    def _disturb(self, process: subprocess.Popen[bytes]) -> bool:
        """Ends a start early; whether it was done by itself before that."""
        (how,) = self.chance.choices(_ENDINGS, _WEIGHTS)
        after = self.chance.random()
        begun = time.monotonic()
        if how is None:
            _wait(process, after * self.start_up)
        else:
            _first_iteration(process, self.run_dir, begun)
            _wait(process, after * self.longest)
        if process.poll() is not None:
            _require(process.returncode, 0, self.run_dir)
            return True
        if how in (signal.SIGTERM, signal.SIGUSR1):
            return self._ask(process, how)
        process.kill()
        if process.wait() == 0:  # in the meantime
            return True
        self.found.kills += 1
        self.found.kills_while_starting += how is None
        saving = list((self.run_dir / "checkpoints").glob(f".*{PART}"))
        self.found.kills_while_saving += bool(saving)
        return False

    def _ask(self, process: subprocess.Popen[bytes], how: signal.Signals) -> bool:
        process.send_signal(how)
        _wait(process, _ANSWER)
        if process.poll() == 0:  # in the meantime
            return True
        _require(process.poll(), PREEMPTED, self.run_dir)
        self.found.preemptions += 1
        return False


def _new(run_dir: Path) -> Path:
    if run_dir.exists():
        raise UserError(f"{run_dir} exists, a soak starts from nothing, another --out is right")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    return run_dir


class _started(subprocess.Popen[bytes]):
    """The command, with what it prints in a file beside its run directory; killed at the end."""

    def __init__(self, command: list[str], run_dir: Path) -> None:
        with run_dir.with_suffix(".printed").open("ab") as printed:
            super().__init__(command, stdout=printed, stderr=printed)

    def __exit__(self, *reason: Any) -> None:
        if self.poll() is None:
            self.kill()
        super().__exit__(*reason)


def _first_iteration(process: subprocess.Popen[bytes], run_dir: Path, begun: float) -> float:
    """Waits until the log tells of a first iteration since `begun`, or the end; seconds it took."""
    log = run_dir / "log.txt"
    before = _size(log)
    while process.poll() is None:
        if _size(log) > before and b"first iteration" in log.read_bytes()[before:]:
            break
        time.sleep(0.05)
    return time.monotonic() - begun


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _size(path: Path) -> int:
    return os.stat(path).st_size if path.exists() else 0


def _require(status: int | None, expected: int, run_dir: Path) -> None:
    if status != expected:
        raise UserError(
            f"a run ended with {status} instead of {expected}, {run_dir}, "
            f"{run_dir.with_suffix('.printed')} tells why"
        )


def _named(run_dir: Path) -> str:
    """What `latest` names."""
    found = latest_checkpoint(run_dir / "checkpoints")
    return found.name if found else ""


def _latest(run_dir: Path) -> Path:
    found = latest_checkpoint(run_dir / "checkpoints")
    if found is None:
        raise UserError(f"no checkpoint, {run_dir}, a run that saves one is right")
    return found


def differences(a: Path, b: Path) -> list[str]:
    """What of two checkpoints (folders) is not the same, bit for bit: tensors and facts by name.

    Not compared is where the weights come from. UserError: one is missing or damaged.
    """
    one, other = load_checkpoint(a), load_checkpoint(b)
    facts = ("network_config", "nimg", "iteration", "metrics")
    found = [name for name in facts if getattr(one, name) != getattr(other, name)]
    for kind in ("average", "training"):
        first, second = getattr(one, kind), getattr(other, kind)
        for name in sorted(first.keys() | second.keys()):
            if name not in first or name not in second or not _same(first[name], second[name]):
                found.append(f"{kind}/{name}")
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Of bits, so that NaN equals itself and 0.0 does not equal -0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
