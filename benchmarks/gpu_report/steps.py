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
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from fastgan_kernels import dispatch
from PIL import Image
from torch import Tensor

from benchmarks.gpu_report.run import Place
from benchmarks.gpu_report.table import described
from benchmarks.measure import DEVICE, ON_GPU, Content, kept_bytes, product_rate, timed
from benchmarks.measure import seconds as now
from fastgan import config as cfg
from fastgan.common.errors import out_of_memory
from fastgan.performance.iteration import iteration_flop
from fastgan.performance.live_step import LiveStep, live_step, measured_config, tiny_overrides

# Name -> overrides of the configuration, of which later ones win.
Variants = Mapping[str, tuple[str, ...]]
PLAIN = ("engine=plain", "kernels=library")
FAST = ("engine=fast", "precision=bf16")
VARIANTS: Variants = {
    "plain-published": (*PLAIN, "precision=published"),
    "compiled-bf16": ("engine=compiled", "precision=bf16"),
    "fast-bf16-nographs": (*FAST, "fast.graphs=false"),
    "fast-bf16": FAST,
    "fast-bf16-shared": (*FAST, "share_fakes=true"),
}
# Row of the ablation -> what it adds to the rows above.
ROWS: Variants = {
    "published": (*PLAIN, "precision=published", "data.resident=false"),
    "precision": ("precision=bf16",),
    "compile": ("engine=compiled", "kernels=auto"),
    "kernels": ("engine=fast", "fast.graphs=false", "fast.fold=false"),
    "folded": ("fast.fold=true",),
    "graphs": ("fast.graphs=true",),
    "resident": ("data.resident=true",),
    "shared": ("share_fakes=true",),
}
# On a CPU the others take minutes and differ by nothing.
DRY_VARIANTS, DRY_ROWS = ("plain-published", "fast-bf16"), ("published", "graphs")
PICTURES, FEW_PICTURES = 4096, 16
# Rounds, and in a turn iterations without the clock, and with it as many as threads decode, which
# come in step with each other; then one with R1.
PACE, DRY_PACE = (4, 2, 4), (2, 0, 1)
# A step with two backbones compiles one function four times, PyTorch refuses the ninth time.
GRAPHS = 64


def steps(place: Place) -> Content:
    """A case of part `steps`; its name is the experiment's."""
    names = DRY_VARIANTS if place.tiny else VARIANTS
    return measure(place, {name: VARIANTS[name] for name in names}, len(names))


def ablation(place: Place) -> Content:
    """A case of part `ablation`; its name is the experiment's."""
    rows = dict(zip(ROWS, accumulate(ROWS.values()), strict=True))
    network = config_of(place, rows["published"]).init.network
    assert network is not None
    shape = (network["img_resolution"], network["img_channels"], network["label_dim"])
    with TemporaryDirectory(prefix="ablation-") as folder:
        data = Path(folder, "pictures.zip")
        write_pictures(data, FEW_PICTURES if place.tiny else PICTURES, *shape)
        chosen = DRY_ROWS if place.tiny else ROWS
        return measure(place, {name: (*rows[name], f"data.path={data}") for name in chosen}, 2)


def config_of(place: Place, overrides: Iterable[str], divisor: int = 1) -> cfg.TrainConfig:
    """As many images in one pass as published for one GPU, or a part of them."""
    experiment = place.result.stem
    small = [*tiny_overrides(experiment), "batch=1"] if place.tiny else []
    config = measured_config(experiment, [*small, f"device={DEVICE}", *overrides])
    images = config.batch if place.tiny else config.loss.published_batch_gpu
    config.batch_gpu = config.batch = max(1, images // divisor)
    return config


def measure(place: Place, variants: Variants, beside: int) -> Content:
    """Facts, turns, speeds and ratios of all variants, of which `beside` live at a time."""
    rate = None if place.tiny else product_rate()["median"]
    content: Content = {"matmul_rate": rate, "variants": {}, "rounds": []}
    start, living = take_settings(), dict[str, Running]()
    together, (rounds, *_) = beside == len(variants), DRY_PACE if place.tiny else PACE
    with ExitStack() as stack:
        for name, overrides in variants.items():
            noted: Content = {"error": None, "facts": None}
            content["variants"][name] = noted
            if len(living) == beside:
                del living[next(iter(living))]
                _free()
            print(name, flush=True)
            for divisor in (1, 2):
                # Halved once where memory does not suffice.
                try:
                    config = config_of(place, overrides, divisor)
                    living[name], noted["facts"] = build(config, stack)
                    noted["error"] = None
                    break
                except Exception as error:
                    noted["error"] = _line(error)
                    if not out_of_memory(error):
                        break
                finally:
                    restore_settings(start)
                    _free()
            # Of all together one turn each, if time ends before they take turns.
            for index in range(1 if together else rounds):
                names = [name] if together else _from(index, living)
                _round(living, names, content, place)
        for index in range(1, rounds if together else 0):
            _round(living, _from(index, living), content, place)
    return described(content)


def _from(index: int, living: Iterable[str]) -> list[str]:
    """All names, another one first each time."""
    names = list(living)
    return names[index % len(names) :] + names[: index % len(names)] if names else []


def _round(living: "dict[str, Running]", names: list[str], content: Content, place: Place) -> None:
    """A turn of each that lives; one that fails is noted and leaves."""
    found: Content = {}
    for name in names:
        try:
            if name in living:
                pace = DRY_PACE if place.tiny else PACE
                found[name] = living[name].turn(len(content["rounds"]), *pace[1:])
        except Exception as error:
            content["variants"][name]["error"] = _line(error)
            del living[name]
            _free()
    content["rounds"].append(found)
    place.note(described(content))


@dataclass
class Running:
    """A built variant. Iterations are numbered as in training, since the number decides on R1;
    batches follow one another whatever these numbers are, so that they can be decoded ahead."""

    live: LiveStep
    settings: Content
    _drawn: int = 0

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
            self.live.step.run(*self.draw(), iteration)

    def turn(self, index: int, untimed: int, clocked: int) -> Content:
        """Seconds of an iteration and of one with R1, with this variant's settings. What was
        decoded while the others ran is not used."""
        self._drawn += self.live.config.data.workers + 1
        before, r1 = take_settings(), (3 + index) * self.interval
        restore_settings(self.settings)
        try:
            self.run(r1 - clocked - untimed, untimed)
            taken = timed([partial(self.run, r1 - clocked, clocked), partial(self.run, r1)])
        finally:
            restore_settings(before)
        return {"iteration": taken[0] / clocked, "r1": taken[1]}


def build(config: cfg.TrainConfig, stack: ExitStack) -> tuple[Running, Content]:
    """A step that has settled, and what it took: seconds until the first iteration was done
    (compilation, choice of algorithms), memory beyond what lived before.

    Leaving `stack` ends the threads that decode. The peak is of a settled iteration with R1: trials
    of algorithms take more, once. The caching allocator's own number is what a card must have; what
    a recorded iteration uses is in no other. `generator_kept`: bytes per image that G's forward
    keeps for its backward.
    """
    # Steps that are compiled side by side share the limit on one function's graphs.
    torch._dynamo.config.recompile_limit = GRAPHS
    before = torch.cuda.memory_reserved() if ON_GPU else 0
    live = live_step(config, torch.device(DEVICE))
    stack.enter_context(live.draw)
    running, begun = Running(live, {}), now()
    running.run(1)
    first_step_seconds = now() - begun
    running.run(running.interval)
    for number in range(2, live.step.settling + 1):
        running.run(number)
        running.run(number * running.interval)
    reals, labels = running.draw()
    noise = torch.randn_like(reals)
    kept = kept_bytes(lambda: live.step._generate(noise, labels))
    _free()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    running.run(running.interval)
    facts: Content = {
        "batch": config.batch,
        "interval": running.interval,
        "flop_per_image": iteration_flop(config),
        "first_step_seconds": first_step_seconds,
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
    labels = []
    with zipfile.ZipFile(target, "w") as archive:
        for index in range(count):
            pixels = draw.integers(256, size=(side, side, channels), dtype=np.uint8).squeeze()
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png", compress_level=0)
            archive.writestr(f"{index:08d}.png", file.getvalue())
            # The last is the largest class, by which a dataset knows how many there are.
            labels += [[f"{index:08d}.png", (classes - count + index) % classes]] if classes else []
        archive.writestr("dataset.json", json.dumps({"labels": labels or None}))


def _free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
