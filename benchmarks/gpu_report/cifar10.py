"""Part `cifar10`: the whole method on the real CIFAR-10, from nothing, in minutes of a GPU.

The project's own commands one after the other: a narrow EDM model is pre-trained, then made a
one-step generator against ImageNet's MobileNetV2. Every number is a Frechet distance of 10,000
images to the 50,000 training images, one seed. Needs in $FASTGAN_DATA (default data/) CIFAR-10's
zips, in $FASTGAN_WEIGHTS (default weights/) the two networks' weights. Runs lie among the caches,
where a case that was stopped goes on: what comes home are networks, grids and curves.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.gpu_report.run import ROOT, Place
from benchmarks.gpu_report.steps import write_pictures
from benchmarks.measure import DEVICE, Content
from fastgan.checkpoint.store import EMA, latest_checkpoint
from fastgan.common.errors import UserError
from fastgan.common.libraries import import_timm
from fastgan.common.noise import seeded

# In this order, as a later one reads what an earlier one made, with expected seconds.
STAGES = {"real": 40, "pretrain": 420, "teacher": 40, "d2o_f": 240, "d2o_f_shared": 240, "d2o": 240}
# Fine-tunes of the same teacher: what differs from cifar10_narrow_d2o_f.
FINE_TUNES = {"d2o_f": (), "d2o_f_shared": ("share_fakes=true",), "d2o": ("freeze.level=0",)}
PRETRAINING = ("experiment=cifar10_narrow_pretrain", "total_images=8M")
FINE_TUNING = (
    *("experiment=cifar10_narrow_d2o_f", "engine=fast", "precision=bf16"),
    *("total_images=1M", "snapshot=100k"),
)
# A dry run's.
BRIEFLY = ("batch=2", "total_images=4", "snapshot=2", "tick=2", "eval.sampler.steps=2")
# Of a distance, and of those that follow the pre-training: Heun's 35 evaluations per image, in
# strict float32, would take longer than the training.
N, FEW = 10_000, 2_000


def cifar10(place: Place) -> Content:
    """The stage that is the case's name. Training that was stopped goes on where it was."""
    # The command that runs gets the signal as well, and saves: wait for it.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    study, name = Study(place), place.result.stem
    if name == "real":
        # Test images against training images: what finite sets leave. Keeps the statistics.
        return study.distances(f"images={study.test}", real=True)
    teacher = place.out / "cifar10/pretrain" / EMA
    if name == "pretrain":
        return study.train("pretrain", *PRETRAINING, n=FEW)
    if not teacher.is_file():
        raise UserError(f"no teacher, {teacher}, the case cifar10/pretrain would make it")
    if name == "teacher":
        # What there was before: one step, un-tuned, and Heun's sampler with 18 steps.
        heun = ("sampler.kind=heun", f"sampler.steps={2 if place.tiny else 18}")
        before = study.distances(f"checkpoint={teacher}")
        return before | {"heun": study.distances(f"checkpoint={teacher}", *heun)["table"]}
    words = (*FINE_TUNING, *FINE_TUNES[name], f"init.path={teacher}", study.backbone)
    found = study.train("train", *words, *(["engine=plain"] if place.tiny else []), n=N)
    return found | study.distances(f"checkpoint={place.folder / EMA}")


class Study:
    """The study's files; a dry run has pictures of noise and random weights."""

    def __init__(self, place: Place) -> None:
        self.place, self.cache = place, place.caches / "cifar10"
        for each in (place.folder, self.cache):
            each.mkdir(parents=True, exist_ok=True)
        key, network = "discriminator.weights.mobilenetv2_100", "mobilenetv2_100"
        if place.tiny:
            self.train_images, self.test = self.cache / "train.zip", self.cache / "test.zip"
            network, weights = "mobilenetv2_050", self.cache / "weights.safetensors"
            write_pictures(self.train_images, 32, 32, 3, 0)
            write_pictures(self.test, 32, 32, 3, 0)
            with seeded(0):
                save_file(import_timm().create_model(network).state_dict(), weights)
            self.features, self.backbone = {}, f"{key}=random"
        else:
            self.train_images = needed("data", "cifar10-32x32-train.zip")
            self.test = needed("data", "cifar10-32x32-test.zip")
            weights = needed("weights", "mobilenetv2_100_imagenet.safetensors")
            resnet = needed("weights", "resnet56_cifar10.safetensors")
            self.features = {"resnet56": ("extractor=resnet56", f"weights={resnet}")}
            self.backbone = f"{key}={weights}"
        # The discriminator's own backbone: what it says of a GAN is biased.
        self.features["mobilenetv2"] = (f"extractor=timm:{network}", f"weights={weights}")

    def statistics(self, features: str) -> Path:
        """Of the training images, which the case `real` leaves."""
        return self.place.out / "cifar10/real" / f"{features}.npz"

    def distances(self, *words: str, real: bool = False) -> Content:
        """By features the distance to the training images' statistics, which `real` writes."""
        found, out = {}, self.cache / "score.json"
        for name, extractor in self.features.items():
            kept = self.statistics(name)
            against = [f"reference={kept}", f"seeds=0-{(16 if self.place.tiny else N) - 1}"]
            if real:
                against = [f"reference={self.train_images}", f"save_reference={kept}"]
            out.unlink(missing_ok=True)
            run("evaluate", *extractor, *words, *against, f"out={out}", "batch=250")
            result = json.loads(out.read_text())
            found[name] = {key: result[key] for key in ("metric", "value", "n")}
        return {"table": found}

    def train(self, command: str, *words: str, n: int) -> Content:
        """Trains, or goes on, measured by `n` images in the first features; brings the averaged
        network, grids and the log, whose distances over thousands of images it returns."""
        folder, run_dir = self.place.folder, self.cache / self.place.result.stem
        name, extractor = next(iter(self.features.items()))
        measured = [*extractor, f"reference={self.statistics(name)}", "batch=250"]
        measured += [f"images={16 if self.place.tiny else n}"]
        words = (*words, f"data.path={self.train_images}", f"run_dir={run_dir}")
        words += tuple(f"eval.{word}" for word in measured)
        run(command, *words, *(BRIEFLY if self.place.tiny else ()))
        latest = latest_checkpoint(run_dir / "checkpoints")
        assert latest is not None
        for file in (latest / EMA, run_dir / "stats.jsonl"):
            shutil.copy(file, folder)
        shutil.copytree(run_dir / "samples", folder / "samples", dirs_exist_ok=True)
        lines = map(json.loads, (run_dir / "stats.jsonl").read_text().splitlines())
        curve = {f"{line['Progress/kimg']:g} kimg": {key.removeprefix("Metric/"): line[key]}
                 for line in lines for key in line if key.startswith("Metric/")}  # fmt: skip
        return {"curve": curve, "table": curve}


def needed(folder: str, name: str) -> Path:
    """A file that has to be brought along. UserError: it was not."""
    path = Path(os.environ.get(f"FASTGAN_{folder.upper()}", ROOT / folder), name)
    if not path.is_file():
        raise UserError(f"{path} is not there, part cifar10 needs it, see docs/gpu-report.md")
    return path


def run(command: str, *words: str) -> None:
    """python -m fastgan.COMMAND. UserError: it failed, or was stopped and has saved."""
    words = (f"device={DEVICE}", *words)
    status = subprocess.run([sys.executable, "-m", f"fastgan.{command}", *words]).returncode
    if status:
        what = f"python -m fastgan.{command} {shlex.join(words)}"
        raise UserError(f"ended with {status}, {what}, 0 was expected")
