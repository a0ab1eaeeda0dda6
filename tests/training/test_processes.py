"""Two processes: they train what one trains, share what they compile, and notice a lost one."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._functorch.config
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters

from fastgan.common import distributed
from fastgan.common.distributed import World
from fastgan.common.errors import run_command
from fastgan.training.compiled import CompiledStep
from fastgan.training.loop import Schedule, run_loop
from fastgan.training.resume import PREEMPTED, Preempted
from fastgan.training.step import PlainStep
from tests.conftest import TINY
from tests.processes import two_processes
from tests.training.tape import TapedStep
from tests.training.test_stop import state, stop_in, train
from tests.training.toys import ALONE, assert_same, edm_step, everything, gan_step, one_hot, reals

PATIENCE = 5.0


def start(worker: str, *arguments: str, **options: object) -> list[str]:
    """Runs a function of this file in two processes; returns what they said on stderr."""
    code = f"from tests.training import test_processes as tests; tests.start_worker('{worker}')"
    return two_processes(code, *arguments, **options)  # type: ignore[arg-type]


def start_worker(name: str) -> None:
    torch.set_num_threads(1)
    globals()[name]()


def part(batch: Tensor, world: World) -> Tensor:
    return batch.chunk(world.size)[world.rank]


def trained(kind: type[PlainStep], world: World, iterations: int, **changes: object) -> dict:
    """What changed, and Loss/D as a mean over all processes."""
    step = gan_step(kind=kind, label_dim=3, world=world, batch_gpu=2, **changes)
    told = torch.zeros((), dtype=torch.float64)
    for k in range(iterations):
        result = step.run(part(reals(k), world), part(one_hot(k, 3), world), k)
        told += result.scalars["Loss/D"]
    assert kind is not TapedStep or len(step.tapes) == 2
    return {"told": distributed.all_reduce_sum(told) / world.size, **everything(step)}


def all_steps(world: World) -> dict[str, Tensor]:
    """The plain step, the recorded one (three of each kind run before one is recorded), EDM's."""
    edm = edm_step(world=world)
    for k in range(3):
        edm.run(part(reals(k), world), None, k)
    found = {
        "plain": trained(PlainStep, world, 5, r1_interval=2),
        "recorded": trained(TapedStep, world, 12, r1_interval=2),
        "edm": everything(edm),
    }
    return {f"{name}/{n}": t for name, tensors in found.items() for n, t in tensors.items()}


def saving_worker() -> None:
    world = distributed.init("cpu", timeout_seconds=60)
    save_file(all_steps(world), Path(sys.argv[1], f"{world.rank}.safetensors"))
    distributed.shutdown()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    start("saving_worker", str(tmp_path))
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second)
    assert_same(first, all_steps(ALONE), atol=1e-10)


def compiling_worker() -> None:
    # Only whole graphs in the cache tell who compiled: the cache above it hides them.
    torch._functorch.config.enable_autograd_cache = False
    world = distributed.init("cpu", timeout_seconds=600)
    found, folder = trained(CompiledStep, world, 2, share_fakes=True), Path(sys.argv[1])
    told = counters["inductor"]
    numbers = {"hits": told["fxgraph_cache_hit"], "misses": told["fxgraph_cache_miss"]}
    (folder / f"{world.rank}.json").write_text(json.dumps(numbers))
    save_file(found, folder / f"{world.rank}.safetensors")
    distributed.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_second_process_finds_the_graphs_of_the_first(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    start("compiling_worker", str(tmp_path), timeout=800, TORCHINDUCTOR_CACHE_DIR=cache)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["misses"] > 0
    assert second["misses"] == 0 and second["hits"] > 0
    found = load_file(tmp_path / "0.safetensors")
    assert_same(found, load_file(tmp_path / "1.safetensors"))
    assert_same(found, trained(PlainStep, ALONE, 2, share_fakes=True), atol=1e-10)


def asked_worker() -> None:
    world = distributed.init("cpu", timeout_seconds=60)
    step = gan_step(world=world, batch_gpu=2)
    if world.rank == 1:
        stop_in(step, 2, signal.SIGUSR1)
    try:
        train(step, Path(sys.argv[1]), world)
    except Preempted:
        distributed.shutdown()
        sys.exit(PREEMPTED)


def test_one_process_is_asked_to_stop_and_both_save(tmp_path: Path) -> None:
    start("asked_worker", str(tmp_path), expected=PREEMPTED)
    assert state(tmp_path)["status"] == "preempted" and state(tmp_path)["nimg"] == 12


def losing_worker() -> None:
    """Trains; in iteration 3 the second process dies, waits too long, or changes a parameter."""
    how, run_dir = sys.argv[1], Path(sys.argv[2])
    world = distributed.init("cpu", PATIENCE)
    step = gan_step(world=world, batch_gpu=2)

    def draw(iteration: int) -> tuple[Tensor, None]:
        if (world.rank, iteration) == (1, 3):
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hang":
                time.sleep(3 * PATIENCE)
                os._exit(7)
            step.update_g.parameters[-1].data += 1e-12
        return part(reals(iteration), world), None

    def run() -> None:
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

    (run_dir / "checkpoints").mkdir(exist_ok=True)
    run_command(run)


@pytest.mark.parametrize(
    ("how", "status", "most"),
    [
        ("die", -signal.SIGKILL, PATIENCE),
        pytest.param("hang", 7, 2 * PATIENCE, marks=pytest.mark.slow),
    ],
)
def test_the_others_end_and_say_so(how: str, status: int, most: float, tmp_path: Path) -> None:
    errors = start("losing_worker", how, str(tmp_path), timeout=60, expected=(1, status))
    line = errors[0].splitlines()[-1]
    assert line.startswith("error: process 0 of 2 lost another one (") and "Traceback" not in line
    assert "Traceback" not in errors[0]
    told = state(tmp_path)
    assert (told["status"], told["exit_code"]) == ("failed", 1)
    assert told["message"] in line
    # One snapshot was due before, and is whole.
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "0000000008"
    ticked = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[-1])["timestamp"]
    assert (tmp_path / "state.json").stat().st_mtime - ticked < most


def test_processes_that_drift_apart_end(tmp_path: Path) -> None:
    errors = start("losing_worker", "drift", str(tmp_path), timeout=60, expected=1)
    for said in errors:
        line = said.splitlines()[-1]
        assert line.startswith("error: processes hold different parameters, at 16 images")
    assert state(tmp_path)["status"] == "failed"
