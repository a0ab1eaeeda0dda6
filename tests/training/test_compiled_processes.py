"""Two processes that compile: the first one does it, the second one reads its graphs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._functorch.config
from torch._dynamo.utils import counters

from fastgan import distributed
from fastgan.training.compiled import CompiledStep
from fastgan.training.ema import averaged_copy
from fastgan.training.step import PlainStep
from tests.training.toys import (
    ALONE,
    assert_same,
    diffusion_heads,
    everything,
    generator,
    reals,
    settings,
)

ROOT = Path(__file__).resolve().parents[2]
_WORKER = "from tests.training.test_compiled_processes import worker; worker()"


def train(kind: type[PlainStep], world: distributed.World) -> dict[str, torch.Tensor]:
    network = generator()
    discriminator = diffusion_heads(network)
    chosen = settings(batch_gpu=2, share_fakes=True)
    step = kind(network, averaged_copy(network), discriminator, chosen, world)
    own = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    for k in range(2):
        step.run(reals(k)[own], None, k)
    return everything(step)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_second_process_finds_the_graphs_of_the_first(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [worker.communicate(timeout=800)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["misses"] > 0
    assert second["misses"] == 0 and second["hits"] > 0
    trained = torch.load(tmp_path / "0.pt", weights_only=True)
    assert_same(trained, torch.load(tmp_path / "1.pt", weights_only=True))
    assert_same(trained, train(PlainStep, ALONE), atol=1e-10)


def worker() -> None:
    torch.set_num_threads(1)
    # Only whole graphs in the cache tell who compiled: the cache above it hides them.
    torch._functorch.config.enable_autograd_cache = False
    world = distributed.init("cpu", timeout_seconds=600)
    found, folder = train(CompiledStep, world), Path(sys.argv[1])
    told = counters["inductor"]
    numbers = {"hits": told["fxgraph_cache_hit"], "misses": told["fxgraph_cache_miss"]}
    (folder / f"{world.rank}.json").write_text(json.dumps(numbers))
    torch.save(found, folder / f"{world.rank}.pt")  # noqa: TID251
    distributed.shutdown()
