"""engine=fast on two processes trains what one plain process does, all-reduces recorded too."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastgan.common import distributed
from fastgan.training.step import PlainStep
from fastgan.training.updater import averaged_copy
from tests.processes import two_processes
from tests.training.tape import TapedStep
from tests.training.toys import (
    ALONE,
    assert_same,
    diffusion_heads,
    everything,
    generator,
    reals,
    settings,
)

_WORKER = "from tests.training.test_fast_processes import worker; worker()"
ITERATIONS = 12  # three of each kind run before one is recorded


def train(kind: type[PlainStep], world: distributed.World) -> dict[str, torch.Tensor]:
    """On this process's part of every batch of 4; Loss/D is told as a mean over all."""
    network = generator()
    heads, chosen = diffusion_heads(network), settings(batch_gpu=2, r1_interval=2)
    step = kind(network, averaged_copy(network), heads, chosen, world)
    own = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    told = torch.zeros((), dtype=torch.float64)
    for k in range(ITERATIONS):
        told += step.run(reals(k)[own], None, k).scalars["Loss/D"]
    assert kind is PlainStep or len(step.tapes) == 2
    return {"told": distributed.all_reduce_sum(told) / world.size, **everything(step)}


def test_two_recorded_processes_equal_a_plain_one(tmp_path: Path) -> None:
    two_processes(_WORKER, str(tmp_path))
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second)
    assert_same(first, train(PlainStep, ALONE), atol=1e-10)


def worker() -> None:
    torch.set_num_threads(1)
    world = distributed.init("cpu", timeout_seconds=60)
    found = train(TapedStep, world)
    save_file(found, Path(sys.argv[1], f"{world.rank}.safetensors"))
    distributed.shutdown()
