"""40 iterations, or 15, kill -9, resume and 25 more: the same bits, in every engine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgan.checkpoint import store
from fastgan.common import distributed
from fastgan.common.distributed import World
from fastgan.training.compiled import CompiledStep
from fastgan.training.edm_step import EdmStep
from fastgan.training.fast import FastStep
from fastgan.training.loop import Schedule, run_loop
from fastgan.training.state import StepResult
from fastgan.training.step import PlainStep
from fastgan.training.updater import Updater, averaged_copy
from tests.conftest import TINY
from tests.processes import ROOT, two_processes
from tests.reliability.projected_heads import ProjectedHeads
from tests.reliability.same import differences
from tests.training.toys import (
    ALONE,
    diffusion_heads,
    edm_step,
    gan_step,
    generator,
    one_hot,
    reals,
    settings,
)

BATCH, LABELS = 4, 3
KILLED = 17  # the iteration that is killed in the middle: after the 15th's checkpoint and an R1
TOTAL, SAVE = 40 * BATCH, 5 * BATCH
FIFTEEN, FORTY = f"{15 * BATCH:010d}", f"{TOTAL:010d}"
_WORKER = "from tests.reliability.test_exact_resume import worker; worker()"


def engine(kind: type[CompiledStep], world: World) -> CompiledStep:
    network = generator(label_dim=LABELS)
    heads = diffusion_heads(network, ("color",))
    chosen = settings(batch_gpu=2)
    return kind(network, averaged_copy(network), heads, chosen, world)


STEPS: dict[str, Callable[[World], PlainStep | EdmStep]] = {
    "plain": lambda world: gan_step(world=world, batch_gpu=2, label_dim=LABELS),
    "plain, projected heads": lambda world: gan_step(
        ProjectedHeads(), world=world, batch_gpu=2, label_dim=LABELS
    ),
    "compiled": partial(engine, CompiledStep),
    "fast": partial(engine, FastStep),
    "pre-training": lambda world: edm_step(world, dropout=0.1),
}


def train(name: str, run_dir: Path, world: World, kill: str = "never") -> None:
    step, checkpoints = STEPS[name](world), run_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    if kill != "never":
        KILLS[kill](step, checkpoints)
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    labelled = name != "pre-training"
    run_loop(
        step,
        lambda k: (reals(k)[own], one_hot(k, LABELS)[own] if labelled else None),
        Schedule(BATCH, TOTAL, tick=2 * SAVE, snapshot=SAVE, keep=2),
        run_dir,
        world,
        network_config=dict(TINY),
        provenance={"license": "test"},
        evaluate=lambda network, nimg: {},
    )


def kill_in_an_iteration(step: PlainStep | EdmStep, checkpoints: Path) -> None:
    """Once checkpoint 15 is whole: G is updated and D's gradients are there, D is not updated."""
    latest = checkpoints / "latest"
    _kill(step, lambda: latest.exists() and latest.read_text() == f"{FIFTEEN}\n")


def kill_while_saving(step: PlainStep | EdmStep, checkpoints: Path) -> None:
    """While one half of checkpoint 15 is written."""
    folder = checkpoints / f".{FIFTEEN}.part"
    half_written = checkpoints.parent.with_suffix(".half")  # a file: the other rank waits too
    save_file = store.save_file

    def stuck(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path)
        if path.parent == folder:
            os.truncate(path, path.stat().st_size // 2)
            half_written.touch()
            time.sleep(600)

    store.save_file = stuck
    _kill(step, half_written.exists)


KILLS = {"in an iteration": kill_in_an_iteration, "while saving": kill_while_saving}


def _kill(step: PlainStep | EdmStep, ready: Callable[[], bool]) -> None:
    """SIGKILL in iteration KILLED, before its last update."""
    last = step.update_g if isinstance(step, EdmStep) else step.update_d
    update, run, now = Updater.__call__, step.run, [0]

    def noted(images: Tensor, labels: Tensor | None, iteration: int) -> StepResult:
        now[0] = iteration
        return run(images, labels, iteration)

    def killed(self: Updater, *arguments: Any) -> Tensor:
        if self is last and now[0] == KILLED:
            while not ready():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, *arguments)

    step.run, Updater.__call__ = noted, killed  # type: ignore[method-assign]


def worker() -> None:
    torch.set_num_threads(1)
    name, run_dir, kill = sys.argv[1:]
    world = distributed.init("cpu", timeout_seconds=300)
    train(name, Path(run_dir), world, kill)
    distributed.shutdown()


def launch(processes: int, name: str, run_dir: Path, kill: str) -> None:
    """One process that is not killed is this one."""
    expected = 0 if kill == "never" else -signal.SIGKILL
    arguments = [name, str(run_dir), kill]
    if processes == 2:
        two_processes(_WORKER, *arguments, timeout=800, expected=expected)
    elif kill == "never":
        train(name, run_dir, ALONE)
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _WORKER, *arguments]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ended.returncode == expected, ended.stderr


def cases() -> list:
    """Every step with one and two processes; what takes longer than a few seconds is slow."""
    fast = ("plain, projected heads", 1, "in an iteration")
    every = [(name, n, kill) for name in STEPS for n in (1, 2) for kill in KILLS]
    return [fast, *(pytest.param(*c, marks=pytest.mark.slow) for c in every if c != fast)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Path]]:
    """The run directory of 40 iterations at once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def trained(name: str, processes: int) -> Path:
        run_dir = folder / f"{name} {processes}"
        if not run_dir.exists():
            launch(processes, name, run_dir, "never")
        return run_dir

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
        yield trained


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "processes", "kill"), cases())
def test_killed_and_resumed_ends_with_the_same_bits(
    name: str, processes: int, kill: str, undisturbed: Callable[[str, int], Path], tmp_path: Path
) -> None:
    whole, run_dir = undisturbed(name, processes), tmp_path / "run"
    launch(processes, name, run_dir, kill)
    there = 15 if kill == "in an iteration" else 10
    assert (run_dir / "checkpoints/latest").read_text() == f"{there * BATCH:010d}\n"
    launch(processes, name, run_dir, "never")
    assert f"{there * BATCH} images are trained" in (run_dir / "log.txt").read_text()
    assert differences(run_dir / "checkpoints" / FORTY, whole / "checkpoints" / FORTY) == []
