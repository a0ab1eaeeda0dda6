"""Two processes train what one process trains with the same total batch."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastgan.common import distributed
from tests.processes import two_processes
from tests.training.toys import assert_same, edm_step, everything, gan_step, one_hot, reals

_WORKER = "from tests.training.test_step_processes import worker; worker()"
ITERATIONS = 17  # with one R1 step


def train(world: distributed.World) -> dict[str, torch.Tensor]:
    """Both steps on this process's part of every batch of 4; reported sums as a mean over all."""
    gan, edm = gan_step(label_dim=3, world=world, batch_gpu=2), edm_step(world=world)
    own = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    told = torch.zeros(2, dtype=torch.float64)
    for k in range(ITERATIONS):
        told[0] += gan.run(reals(k)[own], one_hot(k, 3)[own], k).scalars["Loss/D"]
        told[1] += edm.run(reals(k)[own], None, k).scalars["Loss/denoising"]
    found = {"told": distributed.all_reduce_sum(told) / world.size}
    for name, step in (("gan", gan), ("edm", edm)):
        found |= {f"{name}/{n}": t for n, t in everything(step).items()}
    return found


def test_two_processes_equal_one(tmp_path: Path) -> None:
    two_processes(_WORKER, str(tmp_path))
    one = train(distributed.World(0, 0, 1, torch.device("cpu")))
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second)
    assert_same(first, one, atol=1e-10)


def worker() -> None:
    torch.set_num_threads(1)
    world = distributed.init("cpu", timeout_seconds=60)
    found = train(world)
    save_file(found, Path(sys.argv[1], f"{world.rank}.safetensors"))
    distributed.shutdown()
