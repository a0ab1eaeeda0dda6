"""The steps that are compared: every engine and precision that the configuration knows."""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from fastgan_kernels import dispatch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.gpu_report.results import Content
from benchmarks.gpu_report.timing import DEVICE, ON_GPU, launches, seconds
from fastgan import config as cfg
from fastgan.performance.iteration import iteration_flop
from fastgan.performance.live_step import LiveStep, live_step, measured_config, tiny_overrides
from fastgan.training.step import PlainStep

T = TypeVar("T")
BASELINES = ("plain-published", "compiled-bf16", "fast-bf16")
# A step with two backbones compiles one function four times, PyTorch refuses the ninth time.
GRAPHS = 64


def nothing(step: PlainStep) -> None:
    """The step as it was built."""


@dataclass(frozen=True)
class Variant:
    """A way to run an experiment's iteration: `overrides` of its configuration, later ones win.

    `prepare` changes the built step before its first iteration, where no key does. `data`: a
    dataset in place of noise.
    """

    name: str
    overrides: tuple[str, ...]
    prepare: Callable[[PlainStep], None] = nothing
    data: Path | None = None

    def config(self, experiment: str, batch: int | None, tiny: bool) -> cfg.TrainConfig:
        """Of `batch` images in one forward pass; None: as many as published for one GPU, which the
        published runs accumulate from several such passes."""
        small = [*tiny_overrides(experiment), "batch=1"] if tiny else []
        config = measured_config(experiment, [*small, f"device={DEVICE.type}", *self.overrides])
        config.batch_gpu = config.batch = batch or (
            config.batch if tiny else config.loss.published_batch_gpu
        )
        if self.data is not None:
            config.data.path = str(self.data)
        return config


def of_engine(engine: cfg.Engine, precision: cfg.Precision, share_fakes: bool = False) -> Variant:
    """As the configuration has it; the plain engine as the authors, with PyTorch's operators."""
    overrides = [f"engine={engine.value}", f"precision={precision.value}"]
    overrides += ["kernels=library"] if engine is cfg.Engine.plain else []
    overrides += [f"share_fakes={share_fakes}"]
    shared = "-shared" if share_fakes else ""
    return Variant(f"{engine.value}-{precision.value}{shared}", tuple(overrides))


def all_variants() -> list[Variant]:
    """The authors' arithmetic, the same in bf16, every other engine, the last with shared fakes."""
    engines = [engine for engine in cfg.Engine if engine is not cfg.Engine.plain]
    bf16 = cfg.Precision.bf16
    return [
        of_engine(cfg.Engine.plain, cfg.Precision.published),
        of_engine(cfg.Engine.plain, bf16),
        *(of_engine(engine, bf16) for engine in engines),
        *(of_engine(engine, bf16, share_fakes=True) for engine in engines[-1:]),
    ]


def take_settings() -> Content:
    """What an engine may set for the whole process, as it is now."""
    return {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": torch.backends.cudnn.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "kernels": dispatch._configured,
    }


def restore_settings(settings: Content) -> None:
    """Variants take turns in one process; each must find the settings it was built with."""
    torch.backends.cuda.matmul.allow_tf32 = settings["matmul"]
    torch.backends.cudnn.allow_tf32 = settings["cudnn"]
    torch.backends.cudnn.benchmark = settings["benchmark"]
    dispatch.use(settings["kernels"])


@dataclass
class Running:
    """A built variant. Iterations are numbered as in training, since the number decides on R1;
    batches follow one another whatever these numbers are, so that they can be decoded ahead."""

    live: LiveStep
    settings: Content
    _drawn: int = 0
    _skipped: Tensor | int = 0

    @property
    def skipped(self) -> int:
        """Updates left out so far; waits for the device."""
        return int(self._skipped)

    @property
    def interval(self) -> int:
        return self.live.step.settings.r1_interval

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """The next batch: images and labels."""
        self._drawn += 1
        return self.live.draw(self._drawn)

    def run(self, iteration: int) -> None:
        # Added up on the device, as training does: a recorded step gives the same tensors again.
        for left_out in self.live.step.run(*self.draw(), iteration).skipped.values():
            self._skipped = self._skipped + left_out

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, the process has this variant's settings. Nothing is decoded at its beginning,
        though there was time for it while the others ran."""
        self._drawn += self.live.config.data.workers + 1
        before = take_settings()
        restore_settings(self.settings)
        try:
            yield
        finally:
            restore_settings(before)


def build(
    config: cfg.TrainConfig, prepare: Callable[[PlainStep], None], stack: ExitStack
) -> tuple[Running, Content]:
    """A step that has settled, and what it took: seconds until the first iteration (compilation,
    choice of algorithms) and the first R1 were done, memory beyond what lived before, launches.
    `compiled_before`: torch.compile may have found finished graphs, the first seconds are fewer.

    `prepare` changes the step first; leaving `stack` ends the threads that decode. Peaks are of
    settled iterations: trials of algorithms take more, once. The caching allocator's own number
    (reserved) is what a card must have; what a recorded iteration uses is in no other.
    """
    # Steps that are compiled side by side share the limit on one function's graphs.
    torch._dynamo.config.recompile_limit = GRAPHS
    compiled_before = _compiled_before()
    before, start = _memory(), seconds()
    live = live_step(config, DEVICE)
    prepare(live.step)
    stack.enter_context(live.draw)
    built = seconds()
    running = Running(live, {})
    interval, settling = running.interval, live.step.settling
    assert interval > settling + 2, "the iterations below must not be R1's"
    running.run(1)
    first = seconds()
    running.run(interval)
    facts: Content = {
        "batch": config.batch,
        "interval": interval,
        "flop_per_image": iteration_flop(config),
        "compiled_before": compiled_before,
        "build_seconds": built - start,
        "first_step_seconds": first - built,
        "first_r1_seconds": seconds() - first,
    }
    for number in range(2, settling + 1):
        running.run(number)
        running.run(number * interval)
    facts["peak"] = _peak(running, settling + 1, before)
    facts["peak_r1"] = _peak(running, interval, before)
    facts["generator_kept"] = _optional(lambda: _generator_kept(running))
    facts["launches"] = _optional(lambda: launches(lambda: running.run(settling + 2)))
    running.settings = take_settings()
    return running, facts


def _optional(measured: Callable[[], T]) -> T | None:
    """None, and why, where it fails: the variant's speed does not depend on it."""
    try:
        return measured()
    except Exception:
        traceback.print_exc()
        return None


def _compiled_before() -> bool:
    """Whether this variant may find graphs that another one, or a stopped process, compiled."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    return bool(counters["stats"]["unique_graphs"]) or (folder.name != "" and any(folder.glob("*")))


def _generator_kept(running: Running) -> float | None:
    """Bytes per image that G's forward keeps for its backward; None on a CPU."""
    if not ON_GPU:
        return None
    reals, labels = running.draw()
    before = torch.cuda.memory_allocated()
    fakes = running.live.step._generate(torch.randn_like(reals), labels)
    kept = torch.cuda.memory_allocated() - before - fakes.nbytes
    return kept / len(fakes)


def _memory() -> tuple[int, int]:
    if not ON_GPU:
        return 0, 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def _peak(running: Running, iteration: int, before: tuple[int, int]) -> dict[str, int] | None:
    """Bytes allocated and reserved at most during an iteration, less what there was `before`;
    None on a CPU, whose memory PyTorch does not count."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    running.run(iteration)
    torch.cuda.synchronize()
    return {
        "allocated": torch.cuda.max_memory_allocated() - before[0],
        "reserved": torch.cuda.max_memory_reserved() - before[1],
    }
