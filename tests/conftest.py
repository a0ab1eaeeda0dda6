"""Small networks and worlds that many tests share."""

import os
import time
from pathlib import Path

import pytest
import torch

# Before the kernels are imported: without a GPU they run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastgan.common.distributed import World
from fastgan.common.noise import seeded
from fastgan.models import Precond, network_from_config

GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "precond": "D2OPrecond",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 0,
    "model_type": "DhariwalUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [],
}


@pytest.fixture(autouse=True)
def in_time() -> None:
    """Skips what has not begun at UNTIL (seconds since 1970): how .ci/run keeps to its limit."""
    if time.time() > float(os.environ.get("UNTIL", "inf")):
        pytest.skip("no time left")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Workers of pytest-xdist share the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def golden() -> Path:
    return GOLDEN


@pytest.fixture
def tiny_config() -> dict:
    return dict(TINY)


@pytest.fixture
def tiny_network(tiny_config: dict) -> Precond:
    """A network whose output layers are not silent, so that every gradient is alive."""
    return live_network(tiny_config)


def live_network(config: dict, seed: int = 0) -> Precond:
    """Built from `config`; parameters that start at (nearly) zero are redrawn."""
    with seeded(seed):
        network = network_from_config(config)
        for parameter in network.parameters():
            if parameter.abs().max() < 1e-3:
                torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.fixture
def one_process() -> World:
    return World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
