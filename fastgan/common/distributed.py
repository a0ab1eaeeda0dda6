"""The process group: who we are among how many, and the three things processes tell each other.

Launchers: torchrun (its variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or a
submitit job, whose own helper exports the same variables. Neither means one process, for which
every function below does nothing.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastgan.common.errors import UserError
from fastgan.common.libraries import import_optional

_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_MASTER = ("MASTER_ADDR", "MASTER_PORT")


# How long an exchange may take, as `init` was told: PyTorch's further groups do not inherit it.
_patience = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process's place: global rank, rank on its machine, number of processes, its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def init(device: str, timeout_seconds: float = 600) -> World:
    """Joins the process group (gloo for "cpu", NCCL for "cuda") and selects this rank's GPU.

    A collective that waits longer than `timeout_seconds` fails instead of hanging forever.
    UserError: too few GPUs, variables that contradict each other, no connection.
    """
    assert not dist.is_initialized(), "init() is called once per process"
    _export_submitit_variables()
    rank, local_rank, size = _read_ranks()
    world = World(rank, local_rank, size, _select_device(device, local_rank))
    if size > 1:
        global _patience
        _patience = timedelta(seconds=timeout_seconds)
        _join(world, _patience)
    return world


def rank() -> int:
    """Global rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over the processes, in place, and returns it (any device, any backend)."""
    if not dist.is_initialized():
        return tensor
    with exchanging():
        if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
            on_gpu = tensor.cuda()
            dist.all_reduce(on_gpu)
            return tensor.copy_(on_gpu)
        dist.all_reduce(tensor)
    return tensor


def same_everywhere(values: torch.Tensor) -> bool:
    """Whether all processes hold the same bits in `values`, float64 on their own devices."""
    if not dist.is_initialized():
        return True
    theirs = values.clone()
    with exchanging():
        dist.broadcast(theirs, src=0)
    # As integers: NaN would differ from itself.
    different = (theirs.view(torch.int64) != values.view(torch.int64)).any().double()
    return not all_reduce_sum(different)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every process (a small picklable object: a path, a status)."""
    if not dist.is_initialized():
        return value
    box = [value]
    with exchanging():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        with exchanging():
            dist.barrier()


@contextmanager
def exchanging() -> Iterator[None]:
    """Turns what an exchange fails with, where another process died or hangs, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"process {rank()} of {world_size()} lost another one ({_reason(error)}), in an "
            "exchange between processes, the first error of all of them tells why and the same "
            "command resumes"
        ) from error


def cpu_group() -> dist.ProcessGroup | None:
    """A group over gloo, which does not make a GPU finish its work; None for one process."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=_patience)


@contextmanager
def main_first(most: timedelta = timedelta(hours=2)) -> Iterator[None]:
    """Inside, the first process works alone; the others follow once it is done.

    They wait `most` at the longest, more than a collective does: compiling takes minutes.
    """
    if not dist.is_initialized():
        yield
        return
    group = dist.new_group(backend="gloo", timeout=most)
    if not is_main():
        with exchanging():
            dist.barrier(group)
    try:
        yield
    finally:
        if is_main():
            with exchanging():
                dist.barrier(group)


def shutdown() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _export_submitit_variables() -> None:
    """Inside a submitit job: lets submitit set torchrun's variables, unless torchrun did."""
    if "SUBMITIT_EXECUTOR" not in os.environ or any(name in os.environ for name in _RANKS):
        return
    purpose = "a submitit job (SUBMITIT_EXECUTOR is set)"
    helpers = import_optional("submitit.helpers", purpose, "slurm")
    # Every rank keeps seeing all GPUs, since `init` selects by local rank, as under torchrun.
    environment = helpers.TorchDistributedEnvironment()
    environment.export(set_cuda_visible_devices=False, overwrite=True)


def _read_ranks() -> tuple[int, int, int]:
    """(rank, local rank, size) from torchrun's variables; (0, 0, 1) where there are none."""
    if not any(name in os.environ for name in _RANKS):
        return 0, 0, 1
    missing = [name for name in _RANKS + _MASTER if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{', '.join(missing)} not set though others of torchrun's variables are, "
            f"in the environment, set all of {', '.join(_RANKS + _MASTER)} or none"
        )
    try:
        rank, local_rank, size, port = (int(os.environ[n]) for n in (*_RANKS, "MASTER_PORT"))
    except ValueError as error:
        raise UserError(
            f"RANK, LOCAL_RANK, WORLD_SIZE or MASTER_PORT is no integer ({error}), "
            "in the environment, start with torchrun or unset them"
        ) from error
    if not (0 <= local_rank <= rank < size and 0 < port < 65536):
        raise UserError(
            f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={size}, MASTER_PORT={port} "
            "contradict each other, in the environment, "
            "right is 0 <= LOCAL_RANK <= RANK < WORLD_SIZE and a port of 1-65535"
        )
    return rank, local_rank, size


def _select_device(device: str, local_rank: int) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    assert device == "cuda", device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this machine finds {count} usable GPUs, key `device`, "
            "use device=cpu or start no more processes than there are GPUs"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(world: World, timeout: timedelta) -> None:
    on_gpu = world.device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timeout,
            # Binds NCCL to this GPU, so that objects and barriers go there as well.
            device_id=world.device if on_gpu else None,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"process {world.rank} of {world.size} could not join the others ({_reason(error)}), "
            f"at {address}, check that all processes run and reach that address"
        ) from error


def _reason(error: BaseException) -> str:
    """The first sentence of what a backend says, without the place in its source."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^]]*\] ", "", lines[0]).split(". ")[0]
