"""Parts `steps` and `ablation`: ways to run a published experiment's iteration, taking turns.

`steps` builds its variants in one process (random weights suffice), then come rounds in which each
runs in turn, so that whatever else happens on the machine happens to all. `ablation` goes from the
published iteration to the fastest one, each row adding one thing and taking turns with the row
above it; older ones are gone by then, as no GPU holds all rows of the largest network at a time.
All is noted as it goes: a process that crashes or hangs costs what comes after.
"""

import gc
import io
import json
import traceback
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from fastgan_kernels import dispatch
from PIL import Image
from torch import Tensor

from benchmarks.gpu_report.run import Place
from benchmarks.gpu_report.table import described, gains
from benchmarks.measure import DEVICE, ON_GPU, Content, kept_bytes, product_rate, timed
from benchmarks.measure import seconds as now
from fastgan import config as cfg
from fastgan.common.errors import out_of_memory
from fastgan.performance.iteration import iteration_flop
from fastgan.performance.live_step import LiveStep, live_step, measured_config, tiny_overrides

PLAIN = ("engine=plain", "kernels=library")
FAST = ("engine=fast", "precision=bf16")
VARIANTS = {
    "plain-published": (*PLAIN, "precision=published"),
    "compiled-bf16": ("engine=compiled", "precision=bf16"),
    "fast-bf16-nographs": (*FAST, "fast.graphs=false"),
    "fast-bf16": FAST,
    "fast-bf16-shared": (*FAST, "share_fakes=true"),
}
# On a CPU the others take minutes and differ by nothing.
DRY_VARIANTS, DRY_ROWS = ("plain-published", "fast-bf16"), 3
# Row of the ablation -> what it adds to the rows above; `layout` is no key's.
ROWS = {
    "published": (*PLAIN, "precision=published", "data.resident=false"),
    "layout": (),
    "precision": ("precision=bf16",),
    "compile": ("engine=compiled", "kernels=auto"),
    "kernels": ("engine=fast", "fast.graphs=false", "fast.fold=false"),
    "folded": ("fast.fold=true",),
    "graphs": ("fast.graphs=true",),
    "resident": ("data.resident=true",),
    "shared": ("share_fakes=true",),
}
PICTURES, FEW_PICTURES = 4096, 16
# A step with two backbones compiles one function four times, PyTorch refuses the ninth time.
GRAPHS = 64


class Pace(NamedTuple):
    """What a variant runs in its turns: iterations without the clock, `readings` with it (each the
    mean of `each` iterations in a row), and one with R1."""

    rounds: int
    untimed: int
    readings: int
    each: int


STEPS = Pace(rounds=4, untimed=1, readings=3, each=1)
# As many iterations as threads decode, which come in step with each other.
ABLATION = Pace(rounds=3, untimed=2, readings=2, each=4)
TRIAL = Pace(rounds=1, untimed=1, readings=1, each=1)


@dataclass(frozen=True)
class Variant:
    """A way to run an iteration: `overrides` of its configuration, later ones win; the whole
    discriminator in `channels_last`; `data`: a dataset in place of noise."""

    name: str
    overrides: tuple[str, ...]
    channels_last: bool = False
    data: Path | None = None

    def config(self, experiment: str, tiny: bool, divisor: int = 1) -> cfg.TrainConfig:
        """As many images in one pass as published for one GPU, or a part of them."""
        small = [*tiny_overrides(experiment), "batch=1"] if tiny else []
        config = measured_config(experiment, [*small, f"device={DEVICE}", *self.overrides])
        images = config.batch if tiny else config.loss.published_batch_gpu
        config.batch_gpu = config.batch = max(1, images // divisor)
        if self.data is not None:
            config.data.path = str(self.data)
        return config


def rows(data: Path | None = None) -> list[Variant]:
    """The ablation's, on the images of `data`."""
    names, added = list(ROWS), accumulate(ROWS.values())
    laid_out = names.index("layout")
    return [
        Variant(name, overrides, index >= laid_out, data)
        for index, (name, overrides) in enumerate(zip(names, added, strict=True))
    ]


def steps(place: Place) -> Content:
    """A case of part `steps`; its name is the experiment's."""
    names = DRY_VARIANTS if place.tiny else VARIANTS
    variants = [Variant(name, VARIANTS[name]) for name in names]
    return measure(place, variants, TRIAL if place.tiny else STEPS, len(variants))


def ablation(place: Place) -> Content:
    """A case of part `ablation`; its name is the experiment's."""
    with TemporaryDirectory(prefix="ablation-") as folder:
        data = Path(folder, "pictures.zip")
        network = rows()[0].config(place.result.stem, place.tiny).init.network
        assert network is not None
        shape = (network["img_resolution"], network["img_channels"], network["label_dim"])
        write_pictures(data, FEW_PICTURES if place.tiny else PICTURES, *shape)
        chosen = rows(data)[: DRY_ROWS if place.tiny else None]
        return gains(measure(place, chosen, TRIAL if place.tiny else ABLATION, 2))


def measure(place: Place, variants: Sequence[Variant], pace: Pace, beside: int) -> Content:
    """Facts, readings, speeds and ratios of all variants, of which `beside` live at a time."""
    rate = None if place.tiny else product_rate()["median"]
    content: Content = {"experiment": place.result.stem, "matmul_rate": rate}
    content |= {"variants": {}, "rounds": []}
    start, running = take_settings(), dict[str, Running]()
    together = beside == len(variants)
    with ExitStack() as stack:
        for variant in variants:
            content["variants"][variant.name] = noted = {"error": None, "facts": None}
            if len(running) == beside:
                del running[next(iter(running))]
                _free()
            print(variant.name, flush=True)
            built = _built(variant, noted, place, stack, start)
            if built is None:
                continue
            running[variant.name] = built
            # Of all together first what is known of each if time ends before the rounds.
            alone = {variant.name: built}
            _rounds(alone if together else running, content, TRIAL if together else pace, place)
            if not alone:
                del running[variant.name]
        if together:
            _rounds(running, content, pace, place)
    return described(content)


def _built(
    variant: Variant, noted: Content, place: Place, stack: ExitStack, start: Content
) -> "Running | None":
    """The variant settled, its batch halved once where memory does not suffice; None: it failed,
    which is noted."""
    for divisor in (1, 2):
        try:
            config = variant.config(place.result.stem, place.tiny, divisor)
            running, noted["facts"] = build(config, variant.channels_last, stack)
            noted["error"] = None
            return running
        except Exception as error:
            noted["error"] = _line(error)
            if not out_of_memory(error):
                break
        finally:
            restore_settings(start)
            _free()
    return None


def _rounds(running: "dict[str, Running]", content: Content, pace: Pace, place: Place) -> None:
    """Of all that run, another one beginning each time; one that fails is noted and leaves."""
    for index in range(pace.rounds if running else 0):
        found: Content = {}
        names = list(running)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            noted = content["variants"][name]
            try:
                found[name] = running[name].turn(index, pace)
                noted["skipped_updates"] = running[name].skipped
            except Exception as error:
                noted["error"] = _line(error)
                del running[name]
                _free()
        content["rounds"].append(found)
        place.note(described(content))
        if not running:
            return


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

    def run(self, first: int, count: int = 1) -> None:
        """Iterations `first`, `first` + 1 ..."""
        for iteration in range(first, first + count):
            # Added up on the device, as training does: a recorded step reuses its tensors.
            for left_out in self.live.step.run(*self.draw(), iteration).skipped.values():
                self._skipped = self._skipped + left_out

    def turn(self, index: int, pace: Pace) -> Content:
        """Seconds of iterations and of one with R1, with this variant's settings. What was decoded
        while the others ran is not used."""
        self._drawn += self.live.config.data.workers + 1
        before, r1 = take_settings(), (3 + index) * self.interval
        clocked = pace.readings * pace.each
        assert pace.untimed + clocked < self.interval
        restore_settings(self.settings)
        try:
            self.run(r1 - clocked - pace.untimed, pace.untimed)
            starts = range(r1 - clocked, r1, pace.each)
            taken = timed(
                [*(partial(self.run, k, pace.each) for k in starts), partial(self.run, r1)]
            )
        finally:
            restore_settings(before)
        return {"iterations": [each / pace.each for each in taken[:-1]], "r1": taken[-1]}


def build(config: cfg.TrainConfig, laid_out: bool, stack: ExitStack) -> tuple[Running, Content]:
    """A step that has settled, and what it took: seconds until the first iteration (compilation,
    choice of algorithms) and the first R1 were done, memory beyond what lived before.

    Leaving `stack` ends the threads that decode. The peak is of a settled iteration with R1: trials
    of algorithms take more, once. The caching allocator's own number is what a card must have; what
    a recorded iteration uses is in no other. `generator_kept`: bytes per image that G's forward
    keeps for its backward.
    """
    # Steps that are compiled side by side share the limit on one function's graphs.
    torch._dynamo.config.recompile_limit = GRAPHS
    before = torch.cuda.memory_reserved() if ON_GPU else 0
    live = live_step(config, torch.device(DEVICE))
    if laid_out:
        live.step.discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stack.enter_context(live.draw)
    running, marks = Running(live, {}), [now()]
    for number in (1, running.interval):
        running.run(number)
        marks.append(now())
    for number in range(2, live.step.settling + 1):
        running.run(number)
        running.run(number * running.interval)
    noise, labels = torch.randn_like(running.draw()[0]), running.draw()[1]
    kept = kept_bytes(lambda: live.step._generate(noise, labels))
    _free()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    running.run(running.interval)
    facts: Content = {
        "batch": config.batch,
        "interval": running.interval,
        "flop_per_image": iteration_flop(config),
        "first_step_seconds": marks[1] - marks[0],
        "first_r1_seconds": marks[2] - marks[1],
        "peak_bytes": torch.cuda.max_memory_reserved() - before if ON_GPU else None,
        "generator_kept": kept and kept / config.batch,
    }
    running.settings = take_settings()
    return running, facts


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


def write_pictures(target: Path, count: int, side: int, channels: int, classes: int) -> None:
    """A dataset zip of `count` pictures of noise, the same every time, as PNGs that are not
    compressed: what is in them does not matter to the time they take."""
    draw = np.random.default_rng(0)
    names = [f"{index:08d}.png" for index in range(count)]
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            pixels = draw.integers(256, size=(side, side, channels), dtype=np.uint8).squeeze()
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png", compress_level=0)
            archive.writestr(name, file.getvalue())
        # The last of them is the largest class, by which a dataset knows how many there are.
        labels = [
            [name, (classes - count + i) % classes] for i, name in enumerate(names) if classes
        ]
        archive.writestr("dataset.json", json.dumps({"labels": labels or None}))


def _free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
