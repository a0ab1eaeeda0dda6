"""Part `cifar10`: the whole method on the real CIFAR-10, from nothing, in minutes of a GPU.

A narrow EDM model is pre-trained, then made a one-step generator against ImageNet's MobileNetV2:
D2O-F, the same with shared fakes, and D2O. Every number is a Frechet distance of 10,000 images to
the 50,000 training images, one seed. Needs in $FASTGAN_DATA (default data/) CIFAR-10's zips, the
training images whole or in pieces .00, .01 ..., and in $FASTGAN_WEIGHTS (default weights/) the two
networks' weights. Runs lie among the caches: what comes home are networks, grids and curves.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from benchmarks.gpu_report.run import ROOT, Place, caches
from benchmarks.gpu_report.steps import write_pictures
from benchmarks.measure import DEVICE, Content
from fastgan.checkpoint.network_file import load_network_file
from fastgan.checkpoint.store import EMA, latest_checkpoint
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically
from fastgan.common.libraries import import_timm
from fastgan.common.noise import seeded
from fastgan.export.program import write_rounded
from fastgan.launch.build import saved_network

# Fine-tunes of the same teacher, by case: what differs from cifar10_narrow_d2o_f.
FINE_TUNES = {
    "d2o_f": (),
    "d2o_f_shared": ("share_fakes=true",),
    "d2o": ("freeze.level=0",),
}
# In this order, as a later one reads what an earlier one made, with expected seconds.
STAGES = (("real", 40), ("pretrain", 420), ("teacher", 40), *((name, 240) for name in FINE_TUNES))
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
        return {"scores": study.scores(study.test, reference=study.train)}
    if name == "teacher":
        # What there was before: Heun's sampler with 18 steps, and one step of it, un-tuned.
        heun = ["sampler.kind=heun", f"sampler.steps={2 if place.tiny else 18}"]
        found = study.scores_of(study.teacher(), *heun)
        return {"scores": found, "untuned": study.scores_of(study.teacher())}
    return study.pretrained() if name == "pretrain" else study.fine_tuned(*FINE_TUNES[name])


class Study:
    """The study's files and settings; a dry run has pictures of noise and random weights."""

    def __init__(self, place: Place) -> None:
        self.place, self.tiny = place, place.tiny
        self.cache = caches(place.out) / "cifar10"
        for each in (place.folder, self.cache):
            each.mkdir(parents=True, exist_ok=True)
        self.n, self.features = 16 if self.tiny else N, dict[str, list[str]]()
        if self.tiny:
            weights = self.cache / "mobilenetv2_050.safetensors"
            self.train, self.test = (self.cache / f"{name}.zip" for name in ("train", "test"))
            if not weights.is_file():
                write_pictures(self.train, 32, 32, 3, 0)
                write_pictures(self.test, 48, 32, 3, 0)
                with seeded(0):
                    save_file(import_timm().create_model("mobilenetv2_050").state_dict(), weights)
            self.features = {
                "mobilenetv2": ["extractor=timm:mobilenetv2_050", f"weights={weights}"]
            }
            self.backbone = "discriminator.weights.mobilenetv2_100=random"
            return
        self.train, self.test = (
            training_images(self.cache),
            needed("data", "cifar10-32x32-test.zip"),
        )
        mobilenet = needed("weights", "mobilenetv2_100_imagenet.safetensors")
        resnet = needed("weights", "resnet56_cifar10.safetensors")
        self.backbone = f"discriminator.weights.mobilenetv2_100={mobilenet}"
        # The second is the discriminator's own backbone: what it says of a GAN is biased.
        self.features = {
            "resnet56": ["extractor=resnet56", f"weights={resnet}"],
            "mobilenetv2": ["extractor=timm:mobilenetv2_100", f"weights={mobilenet}"],
        }

    def teacher(self) -> Path:
        found = self.place.out / "cifar10/pretrain" / EMA
        if not found.is_file():
            raise UserError(f"no teacher, {found}, the case cifar10/pretrain would make it")
        return found

    def statistics(self, features: str) -> Path:
        """Of the training images, which the case `real` leaves."""
        return self.place.out / "cifar10/real" / f"{features}.npz"

    def scores(self, images: Path, *, reference: Path | None = None) -> Content:
        """By features the distance of images to the training images' statistics; or to `reference`,
        whose statistics become these."""
        found, out = {}, self.cache / "score.json"
        for name, extractor in self.features.items():
            kept = self.statistics(name)
            words = [*extractor, f"images={images}", f"out={out}", "batch=250"]
            words += [f"reference={reference or kept}"]
            words += [f"save_reference={kept}"] if reference else []
            out.unlink(missing_ok=True)
            run("evaluate", words)
            result = json.loads(out.read_text())
            found[name] = {key: result[key] for key in ("metric", "value", "n")}
        return found

    def scores_of(self, network: Path, *sampler: str) -> Content:
        """The same of a network's images of seeds 0 to n - 1."""
        images = self.cache / "sampled.npz"
        images.unlink(missing_ok=True)
        words = [f"checkpoint={network}", f"out={images}", f"seeds=0-{self.n - 1}", "batch=250"]
        run("sample", [*words, *sampler])
        return self.scores(images)

    def pretrained(self) -> Content:
        """The narrow EDM model, measured at its snapshots by Heun's sampler of 18 steps."""
        words = ["experiment=cifar10_narrow_pretrain", "total_images=8M"]
        if self.tiny:
            words += ["batch=4", "total_images=8", "snapshot=4", "tick=4", "eval.sampler.steps=2"]
            words += ["network.model_channels=16", "precision=published"]
        return self._trained("pretrain", words, min(self.n, FEW))

    def fine_tuned(self, *different: str) -> Content:
        """A fine-tune of the teacher on engine=fast, measured at its snapshots and at its end."""
        words = ["experiment=cifar10_narrow_d2o_f", *different, f"init.path={self.teacher()}"]
        words += [self.backbone, "engine=fast", "precision=bf16"]
        words += ["total_images=1M", "snapshot=100k"]
        if self.tiny:
            words += ["engine=plain", "batch=2", "total_images=4", "snapshot=2", "tick=2"]
        found = self._trained("train", words, self.n)
        return found | {"scores": self.scores_of(self.place.folder / EMA)}

    def _trained(self, command: str, words: list[str], images: int) -> Content:
        """Trains, or goes on training, measured by so many `images` in the first features; brings
        the averaged network in bfloat16, grids and the log."""
        folder, run_dir = self.place.folder, self.cache / self.place.result.stem
        name, extractor = next(iter(self.features.items()))
        words = [*words, f"data.path={self.train}", f"run_dir={run_dir}"]
        words += [f"eval.{word}" for word in extractor]
        words += [f"eval.reference={self.statistics(name)}", f"eval.images={images}"]
        run(command, [*words, "eval.batch=250"])
        latest = latest_checkpoint(run_dir / "checkpoints")
        assert latest is not None
        network, file = saved_network(str(latest), torch.device("cpu"))
        write_rounded(load_network_file(file), network, folder / EMA, "bf16")
        shutil.copy(run_dir / "stats.jsonl", folder)
        shutil.copytree(run_dir / "samples", folder / "samples", dirs_exist_ok=True)
        return curve(folder / "stats.jsonl")


def needed(folder: str, name: str) -> Path:
    """A file that has to be brought along. UserError: it was not."""
    path = Path(os.environ.get(f"FASTGAN_{folder.upper()}", ROOT / folder), name)
    if not path.is_file():
        raise UserError(f"{path} is not there, part cifar10 needs it, see docs/gpu-report.md")
    return path


def training_images(cache: Path) -> Path:
    """The zip, joined from its pieces where it came in pieces."""
    name, joined = "cifar10-32x32-train.zip", cache / "train.zip"
    pieces = Path(os.environ.get("FASTGAN_DATA", ROOT / "data")).glob(f"{name}.[0-9][0-9]")
    found = sorted(pieces)
    if not found:
        return needed("data", name)
    if not joined.is_file():
        with replace_atomically(joined) as file:
            for piece in found:
                file.write(piece.read_bytes())
    return joined


def run(command: str, words: list[str]) -> None:
    """python -m fastgan.COMMAND. UserError: it failed, or was stopped and has saved."""
    words = [f"device={DEVICE}", *words]
    status = subprocess.run([sys.executable, "-m", f"fastgan.{command}", *words]).returncode
    if status:
        what = f"python -m fastgan.{command} {shlex.join(words)}"
        raise UserError(f"ended with {status}, {what}, 0 was expected")


def curve(log: Path) -> Content:
    """Of a run's statistics: distance over thousands of images, and the median speed of a tick."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    metrics = [(k, line) for line in lines for k in line if k.startswith("Metric/")]
    speeds = [line["Timing/img_per_sec"] for line in lines if "Timing/img_per_sec" in line]
    return {
        "curve": [{"kimg": line["Progress/kimg"], "value": line[key]} for key, line in metrics],
        "metric": metrics[0][0].removeprefix("Metric/") if metrics else None,
        "img_per_sec": {"median": median(speeds), "n": len(speeds)},
    }
