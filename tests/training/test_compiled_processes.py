"""Two processes that compile: the first one does it, the second one reads its graphs."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch._functorch.config
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from fastgan.common import distributed
from fastgan.training.compiled import CompiledStep
from fastgan.training.step import PlainStep
from fastgan.training.updater import averaged_copy
from tests.processes import two_processes
from tests.training.toys import (
    ALONE,
    assert_same,
    diffusion_heads,
    everything,
    generator,
    reals,
    settings,
)

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
    cache = str(tmp_path / "cache")
    two_processes(_WORKER, str(tmp_path), timeout=800, TORCHINDUCTOR_CACHE_DIR=cache)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["misses"] > 0
    assert second["misses"] == 0 and second["hits"] > 0
    trained = load_file(tmp_path / "0.safetensors")
    assert_same(trained, load_file(tmp_path / "1.safetensors"))
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
    save_file(found, folder / f"{world.rank}.safetensors")
    distributed.shutdown()
