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

from benchmarks.gpu_report.parts import AGAIN, BESIDE, ROOT, Case, module
from benchmarks.gpu_report.pictures import write_pictures
from benchmarks.gpu_report.results import Content, case_parser, header, write_json
from benchmarks.gpu_report.runner import CACHES
from benchmarks.gpu_report.timing import DEVICE
from fastgan.checkpoint.network_file import load_network_file
from fastgan.checkpoint.store import EMA, latest_checkpoint
from fastgan.common.errors import UserError, run_command
from fastgan.common.files import replace_atomically
from fastgan.common.libraries import import_timm
from fastgan.common.noise import seeded
from fastgan.export.program import write_rounded
from fastgan.launch.build import saved_network
from fastgan.training.resume import PREEMPTED, Preempted

PART = "cifar10"
# Fine-tunes of the same teacher, by case: what differs from cifar10_narrow_d2o_f.
FINE_TUNES = {
    "d2o_f": (),
    "d2o_f_shared": ("share_fakes=true",),
    "d2o": ("freeze.level=0",),
}
SECONDS = {"real": 60, "pretrain": 540, "teacher": 60} | dict.fromkeys(FINE_TUNES, 300)
IMAGES = {"pretrain": "10M", "fine-tune": "1M"}
# Of a distance, and of those that follow the pre-training.
N, FEW = 10_000, 2_000
_PIECES = "cifar10-32x32-train.zip.[0-9][0-9]"


def cases(tiny: bool) -> list[Case]:
    """In this order: a later one reads what an earlier one made. Training goes on where it was."""
    return [
        Case(
            PART,
            stage,
            expected,
            module("cifar10", "--stage", stage, "--folder", BESIDE, tiny=tiny),
            resumes=stage in FINE_TUNES or stage == "pretrain",
        )
        for stage, expected in SECONDS.items()
    ]


class Study:
    """The study's files and settings; `folder` is the stage's own, beside the others'."""

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.folder, self.tiny = folder, tiny
        self.cache = folder.parent.parent / CACHES / PART
        for each in (self.folder, self.cache):
            each.mkdir(parents=True, exist_ok=True)
        self.common = [f"device={DEVICE.type}"]
        self.n = 16 if tiny else N
        self.features: dict[str, list[str]]
        if tiny:
            self.train, self.test = (self._pictures(name) for name in ("train", "test"))
            extractor = ["extractor=timm:mobilenetv2_050", f"weights={self._random_weights()}"]
            self.features = {"mobilenetv2": extractor}
            self.backbone = "discriminator.weights.mobilenetv2_100=random"
            return
        self.train, self.test = _training_images(self.cache), _needed("data", "test.zip")
        mobilenet = _needed("weights", "mobilenetv2_100_imagenet.safetensors")
        resnet = _needed("weights", "resnet56_cifar10.safetensors")
        self.backbone = f"discriminator.weights.mobilenetv2_100={mobilenet}"
        # The second is the discriminator's own backbone: what it says of a GAN is biased.
        self.features = {
            "resnet56": ["extractor=resnet56", f"weights={resnet}"],
            "mobilenetv2": ["extractor=timm:mobilenetv2_100", f"weights={mobilenet}"],
        }

    def run_dir(self, stage: str) -> Path:
        return self.cache / stage

    def reference(self, features: str) -> Path:
        """Statistics of the training images, of stage `real`."""
        return self.folder.parent / "real" / f"{features}.npz"

    def teacher(self) -> Path:
        found = self.folder.parent / "pretrain" / EMA
        if not found.is_file():
            raise UserError(f"no teacher, {found}, the case {PART}/pretrain would make it")
        return found

    def scores(self, images: Path, *, reference: Path | None = None) -> Content:
        """By features the distance of images, as python -m fastgan.evaluate measures it, to the
        training images' statistics; or to `reference`, whose statistics become these."""
        found = {}
        for name, extractor in self.features.items():
            out, kept = self.folder / f".score-{name}.json", self.reference(name)
            out.unlink(missing_ok=True)
            words = [*self.common, *extractor, f"images={images}", f"out={out}", "batch=250"]
            words += [f"reference={reference or kept}"]
            words += [] if reference is None else [f"save_reference={kept}"]
            run("evaluate", words)
            result = json.loads(out.read_text())
            out.unlink()
            found[name] = {key: result[key] for key in ("metric", "value", "n")}
        return found

    def scores_of(self, network: Path, *sampler: str) -> Content:
        """The same of a network's images of seeds 0 to n - 1."""
        images = self.cache / "sampled.npz"
        images.unlink(missing_ok=True)
        words = [f"checkpoint={network}", f"out={images}", f"seeds=0-{self.n - 1}", "batch=250"]
        run("sample", [*self.common, *words, *sampler])
        return self.scores(images)

    def snapshots(self, images: int) -> list[str]:
        """How training measures itself: by the first features, at every snapshot."""
        name, words = next(iter(self.features.items()))
        return [f"eval.{word}" for word in words] + [
            f"eval.reference={self.reference(name)}", f"eval.images={images}", "eval.batch=250",
        ]  # fmt: skip

    def _pictures(self, name: str) -> Path:
        path = self.cache / f"{name}.zip"
        if not path.is_file():
            count = 32 if name == "train" else 48
            write_pictures(path, count, resolution=32, channels=3, label_dim=0)
        return path

    def _random_weights(self) -> Path:
        path = self.cache / "mobilenetv2_050.safetensors"
        if not path.is_file():
            with seeded(0):
                save_file(import_timm().create_model("mobilenetv2_050").state_dict(), path)
        return path


def _needed(folder: str, name: str) -> Path:
    place = Path(os.environ.get(f"FASTGAN_{folder.upper()}", ROOT / folder))
    path = place / (f"cifar10-32x32-{name}" if folder == "data" else name)
    if not path.is_file():
        raise UserError(f"{path} is not there, part {PART} needs it, see docs/gpu-report.md")
    return path


def _training_images(cache: Path) -> Path:
    """The zip, joined from its pieces where it came in pieces."""
    joined = cache / "train.zip"
    place = Path(os.environ.get("FASTGAN_DATA", ROOT / "data"))
    pieces = sorted(place.glob(_PIECES))
    if not pieces:
        return _needed("data", "train.zip")
    if not joined.is_file():
        with replace_atomically(joined) as file:
            for piece in pieces:
                file.write(piece.read_bytes())
    return joined


def run(command: str, words: list[str]) -> None:
    """python -m fastgan.COMMAND; Preempted where it was stopped. UserError: it failed."""
    status = subprocess.run([sys.executable, "-m", f"fastgan.{command}", *words]).returncode
    if status == PREEMPTED:
        raise Preempted(command)
    if status:
        what = f"python -m fastgan.{command} {shlex.join(words)}"
        raise UserError(f"ended with {status}, {what}, 0 was expected")


def real(study: Study) -> Content:
    """Test images against training images: what finite sets leave. Keeps the statistics."""
    return {"scores": study.scores(study.test, reference=study.train)}


def pretrained(study: Study) -> Content:
    """The narrow EDM model, measured at its snapshots by Heun's sampler of 18 steps."""
    words = ["experiment=cifar10_narrow_pretrain", f"total_images={IMAGES['pretrain']}"]
    if study.tiny:
        words += ["batch=4", "total_images=8", "snapshot=4", "tick=4", "eval.sampler.steps=2"]
        words += ["network.model_channels=16", "precision=published"]
    # Heun's 35 evaluations per image, in strict float32, would take longer than the training.
    return _trained(study, "pretrain", "pretrain", words, min(study.n, FEW))


def teacher(study: Study) -> Content:
    """What there was before: Heun's sampler with 18 steps, and one step of it, un-tuned."""
    network, steps = study.teacher(), 2 if study.tiny else 18
    return {
        "scores": study.scores_of(network, "sampler.kind=heun", f"sampler.steps={steps}"),
        "untuned": study.scores_of(network),
    }


def fine_tuned(study: Study, stage: str) -> Content:
    """A fine-tune of the teacher on engine=fast, measured at its snapshots and at its end."""
    words = ["experiment=cifar10_narrow_d2o_f", *FINE_TUNES[stage], f"init.path={study.teacher()}"]
    words += [study.backbone, "engine=fast", "precision=bf16"]
    words += [f"total_images={IMAGES['fine-tune']}", "snapshot=100k"]
    if study.tiny:
        words += ["engine=plain", "batch=2", "total_images=4", "snapshot=2", "tick=2"]
    found = _trained(study, stage, "train", words, study.n)
    return found | {"scores": study.scores_of(study.folder / EMA)}


def _trained(study: Study, stage: str, command: str, words: list[str], images: int) -> Content:
    """Trains, or goes on training, measured by so many `images`; brings the averaged network in
    bfloat16, grids and the log."""
    run_dir = study.run_dir(stage)
    settings = [*study.common, f"data.path={study.train}", f"run_dir={run_dir}"]
    run(command, [*words, *settings, *study.snapshots(images)])
    latest = latest_checkpoint(run_dir / "checkpoints")
    assert latest is not None
    network, file = saved_network(str(latest), torch.device("cpu"))
    write_rounded(load_network_file(file), network, study.folder / EMA, "bf16")
    shutil.copy(run_dir / "stats.jsonl", study.folder)
    shutil.copytree(run_dir / "samples", study.folder / "samples", dirs_exist_ok=True)
    return curve(study.folder / "stats.jsonl")


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


def merged(found: dict[str, Content]) -> Content:
    first = next(iter(found.values()))
    keys = ("scores", "untuned", "curve", "metric", "img_per_sec")
    stages = {name: {k: each[k] for k in keys if k in each} for name, each in found.items()}
    return {key: first[key] for key in header()} | {"images": IMAGES, "stages": stages}


def main() -> int:
    parser = case_parser(__doc__)
    parser.add_argument("--stage", required=True, choices=list(SECONDS))
    parser.add_argument("--folder", type=Path, required=True, help="for what the stage makes")
    options = parser.parse_args()
    study = Study(options.folder, options.tiny)
    stages = {"real": real, "pretrain": pretrained, "teacher": teacher}
    stage = stages.get(options.stage) or (lambda study: fine_tuned(study, options.stage))
    # The command that runs gets the signal as well, and saves: wait for it.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        content = stage(study)
    except Preempted:
        return AGAIN
    write_json(options.out, header() | content)
    return 0


if __name__ == "__main__":
    run_command(main)
