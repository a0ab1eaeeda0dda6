"""One process, two processes, and environments that contradict themselves."""

import socket
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgan.common import distributed
from fastgan.common.errors import UserError
from fastgan.evaluation.protocol import generator_statistics
from tests.processes import two_processes

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WORKER = "from tests.test_distributed import worker; worker()"


class First:
    """Features: the first three values of an image."""

    name, dim, resize, device = "first", 3, "none", torch.device("cpu")

    def provenance(self) -> dict:
        return {"name": self.name}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3].float()


def sample(seeds: list[int]) -> torch.Tensor:
    """An image per seed, the same in any batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = [torch.randint(0, 256, (1, 2, 2), generator=g, dtype=torch.uint8) for g in generators]
    return torch.stack(draws)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_VARIABLES, "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)


def _set(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    for name, value in zip(_VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)


def test_one_process_needs_nothing() -> None:
    world = distributed.init("cpu")
    assert world == distributed.World(0, 0, 1, torch.device("cpu"))
    tensor = torch.tensor([3.0])
    assert distributed.all_reduce_sum(tensor).item() == 3.0
    assert distributed.broadcast_object("x") == "x"
    assert distributed.is_main() and distributed.world_size() == 1
    distributed.barrier()
    distributed.shutdown()


def test_torchrun_with_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, "0", "0", "1", "localhost", "1")
    assert distributed.init("cpu").size == 1
    assert not torch.distributed.is_initialized()


def worker() -> None:
    """One start of a process group serves every check of it."""
    folder = Path(sys.argv[1])
    world = distributed.init("cpu", timeout_seconds=30)
    assert world.size == 2 and distributed.is_main() == (world.rank == 0)
    assert distributed.all_reduce_sum(torch.tensor([world.rank + 1.0])).item() == 3.0
    assert distributed.broadcast_object({"from": world.rank}) == {"from": 0}
    shared = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    assert distributed.same_everywhere(shared)
    assert not distributed.same_everywhere(shared[:1] + world.rank)
    with distributed.main_first():
        assert (folder / "first was here").exists() != distributed.is_main()
        time.sleep(0.3)
        (folder / "first was here").touch()
    two = generator_statistics(sample, range(21), First(), 4)
    one = load_file(folder / "one")
    assert two.n == 21 and two.source["seeds"] == "0-20"
    torch.testing.assert_close(two.mean, one["mean"])
    torch.testing.assert_close(two.covariance, one["covariance"])
    distributed.shutdown()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one = generator_statistics(sample, range(21), First(), 21)
    save_file({"mean": one.mean, "covariance": one.covariance}, tmp_path / "one")
    two_processes(_WORKER, str(tmp_path), timeout=60)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("0", "0", "2", "", ""), "MASTER_ADDR, MASTER_PORT not set"),
        (("2", "0", "2", "localhost", "29500"), "RANK=2, .* contradict each other"),
        (("0", "1", "2", "localhost", "29500"), "contradict each other"),
        (("0", "0", "2", "localhost", "0"), "contradict each other"),
        (
            ("0", "0", "two", "localhost", "29500"),
            "no integer .*'two'",
        ),
    ],
)
def test_contradictions(
    monkeypatch: pytest.MonkeyPatch, values: tuple[str, ...], message: str
) -> None:
    _set(monkeypatch, *values)
    with pytest.raises(UserError, match=message):
        distributed.init("cpu")


def test_an_absent_partner_is_a_bounded_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    _set(monkeypatch, "1", "1", "2", "localhost", port)
    with pytest.raises(UserError, match=f"process 1 of 2 could not join .* localhost:{port}"):
        distributed.init("cpu", timeout_seconds=1)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds 0 usable GPUs, key `device`"):
        distributed.init("cuda")


def test_submitit_exports_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    class Environment:
        def export(self, set_cuda_visible_devices: bool, overwrite: bool) -> None:
            assert not set_cuda_visible_devices and overwrite
            _set(monkeypatch, "0", "0", "1", "localhost", "29500")

    helpers = types.ModuleType("submitit.helpers")
    helpers.TorchDistributedEnvironment = Environment  # type: ignore[attr-defined]
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setitem(sys.modules, "submitit", types.ModuleType("submitit"))
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    assert distributed.init("cpu").size == 1
    assert distributed._read_ranks() == (0, 0, 1)
    for name in _VARIABLES:
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "submitit.helpers", None)
    with pytest.raises(UserError, match=r"submitit.helpers is not installed.*fastgan\[slurm\]"):
        distributed.init("cpu")
