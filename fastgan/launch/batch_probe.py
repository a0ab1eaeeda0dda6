"""batch_gpu=auto: the most images per forward pass that the GPU's memory holds, found by trying.

A trial builds the step on copies of the networks, in this process alone, and runs iterations of
noise images: nothing of the training itself changes, no weight, no statistic, no random number. The
largest batch that fits on every process is taken.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgan.common import distributed
from fastgan.common.distributed import World
from fastgan.common.errors import UserError, out_of_memory
from fastgan.common.noise import normal, stream
from fastgan.config import RunConfig, TrainConfig
from fastgan.launch import checks
from fastgan.launch.run_dir import write_config
from fastgan.models import Precond
from fastgan.training.fast import WARMUP
from fastgan.training.state import TrainingStep

# The share of a GPU that a trial may take at its peak; the rest is for all-reduces, evaluation and
# fragmentation.
SHARE = 0.9
# Of each kind of iteration: one settles, then as many as are run before one is recorded, the
# recorded one, and a replay.
_TIMES = WARMUP + 3
_GIB = 1 << 30

Images = tuple[Tensor, Tensor | None]


def settle_batch_gpu(
    config: RunConfig, world: World, network: Precond, build: Callable[[Any, World], TrainingStep]
) -> None:
    """Makes batch_gpu=auto a number, in `config` and in the run's config.yaml, and says so.

    `build(config, world)` makes the configuration's step on copies. On a CPU, whose memory nobody
    counts, auto is all images at once. UserError where not even one image fits.
    """
    if config.batch_gpu != checks.AUTO:
        return
    local, memory = checks.local_images(config, world.size), memory_of(world.device)
    if memory is None:
        config.batch_gpu, found = local, "on a CPU all at once, nothing is tried"
    else:
        # Alone: a process that runs out of memory must not leave the others in an exchange.
        alone = World(rank=0, local_rank=world.local_rank, size=1, device=world.device)
        images = _noise(network, local, world.device)
        interval = config.loss.r1_interval if isinstance(config, TrainConfig) else 0

        def trial(size: int) -> int:
            step = build(replace(config, batch=local, batch_gpu=size), alone)
            return _peak(step, images, interval, memory)

        largest = _largest(trial, checks.divisors(local), memory)
        if largest is None:
            right = ", ".join([*_last_resort(config), "precision=bf16 or a GPU with more memory"])
            raise UserError(
                f"batch_gpu=auto: not even one image per pass fits, on {world.device} with "
                f"{memory.total / _GIB:.1f} GiB, {right} would be right"
            )
        config.batch_gpu, peak = largest
        found = f"{peak / _GIB:.1f} of {memory.total / _GIB:.1f} GiB at the peak of a trial"
    if distributed.is_main():
        print(f"batch_gpu=auto: {_describe(config, local)}; {found}", flush=True)
        write_config(config)


def memory_of(device: torch.device) -> "GpuMemory | None":
    """The device's memory; None for a CPU."""
    return GpuMemory(device) if device.type == "cuda" else None


class GpuMemory:
    """A GPU's memory, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total = torch.cuda.mem_get_info(device)[1]

    def forget(self) -> None:
        """Returns what nobody needs to the GPU and starts a new peak."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """The most that was taken since `forget`, by PyTorch then and by all others now."""
        free, total = torch.cuda.mem_get_info(self._device)
        others = total - free - torch.cuda.memory_reserved(self._device)
        return others + torch.cuda.max_memory_reserved(self._device)


def naming_batch_gpu(config: RunConfig, world: World) -> AbstractContextManager[None]:
    """Within, running out of memory is a UserError naming the next smaller batch_gpu."""
    choices = checks.divisors(checks.local_images(config, world.size))
    size = checks.local_batches(config, world.size)
    return naming_what_fits("batch_gpu", size, choices, _last_resort(config))


@contextmanager
def naming_what_fits(
    key: str, value: int, choices: Iterable[int], last_resort: Iterable[str] = ()
) -> Iterator[None]:
    """Within, running out of memory is a UserError naming the largest choice below `value`.

    `last_resort`: a setting that takes less memory at the same value.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        smaller = max((choice for choice in choices if choice < value), default=None)
        if smaller is None:
            right = ", ".join([*last_resort, "precision=bf16 or a GPU with more memory"])
        else:
            right = " or ".join([f"{key}={smaller}, the next smaller one,", *last_resort])
        raise UserError(f"out of memory, with {key}={value}, {right} would be right") from error


def _largest(
    trial: Callable[[int], int], sizes: list[int], memory: GpuMemory
) -> tuple[int, int] | None:
    """The largest size that fits on all processes, and its trial's peak in bytes here."""
    for size in reversed(sizes):
        try:
            peak = trial(size)
            fits = peak <= SHARE * memory.total
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fits = False
        # Steps and their compiled functions know each other.
        torch.compiler.reset()
        gc.collect()
        memory.forget()
        if distributed.all_reduce_sum(torch.tensor(float(not fits))) == 0:
            return size, peak
    return None


def _peak(step: TrainingStep, images: Images, interval: int, memory: GpuMemory) -> int:
    """Of settled iterations: choosing cuDNN's algorithms takes more, once, if it is there."""
    # At least every second iteration is without R1, unless all are with it.
    plain = [k for k in range(1, 2 * _TIMES) if not interval or k % interval][:_TIMES]
    with_r1 = [k * interval for k in range(1, _TIMES + 1)] if interval else []
    for iteration in (*plain[:1], *with_r1[:1]):
        step.run(*images, iteration)
    memory.forget()
    for iteration in (*plain[1:], *with_r1[1:]):
        step.run(*images, iteration)
    return memory.peak()


def _noise(network: Precond, n: int, device: torch.device) -> Images:
    """Images and labels of the network's shape; the numbers do not matter."""
    size = network.model.img_resolution
    shape = (n, network.model.img_channels, size, size)
    images = normal(stream(0, "probe", device=device), *shape, dtype=torch.float32)
    return images, images.new_zeros(n, network.label_dim) if network.label_dim else None


def _describe(config: RunConfig, local: int) -> str:
    text = f"{config.batch_gpu} images per pass, {local // config.batch_gpu} rounds"
    if isinstance(config, TrainConfig):
        published = config.loss.published_batch_gpu
        text += f"; also the batch of the heads' BatchNorm (published: {published})"
        if config.batch_gpu < min(published, local):
            text += "".join(f", {key} would allow a larger one" for key in _last_resort(config))
    return text


def _last_resort(config: RunConfig) -> list[str]:
    """What saves memory in a fine-tune at any batch, unless it is set: recomputed activations."""
    saves = isinstance(config, TrainConfig) and not config.generator.checkpoint
    return ["generator.checkpoint=true"] if saves else []
