"""Remakes the digits model that ships with the package, from nothing: make pretrain-demo.

Trains the EDM model (experiment=demo_pretrain) and the classifier on digits/train, measures every
checkpoint's Heun samples against digits/val, and writes the two files, their card and the curve.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from demo import CLASSIFIER, CPU, SPACES, TEACHER, Measure, generated, real_images

from fastgan import config as cfg
from fastgan.common.errors import ArgumentParser, run_command
from fastgan.common.files import file_sha256
from fastgan.data.dataset import Digits
from fastgan.evaluation.classifiers import accuracy, save_classifier, train_classifier
from fastgan.launch import build
from fastgan.launch.cli import compose
from fastgan.pretrain import pretrain

STEPS = 18
CURVE = Path("docs/images/demo_teacher.png")


def learning_curve(run_dir: Path) -> dict[str, Any]:
    """Distances of Heun samples to digits/val at every checkpoint, and of real images."""
    measure = Measure("val")
    points = []
    for folder in sorted(p for p in (run_dir / "checkpoints").iterdir() if p.is_dir()):
        network = build.saved_network(str(folder), CPU)[0]
        distances = measure(generated(network, cfg.SamplerConfig("heun", STEPS)))
        points.append({"nimg": int(folder.name), **distances})
        print(json.dumps(points[-1]), flush=True)
    return {"points": points, "real": measure(real_images()), "heun_steps": STEPS}


def plot(curve: dict[str, Any], path: Path) -> None:
    """The curve as a picture: both distances over images seen, the floor dashed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, space in zip(axes, SPACES, strict=True):
        kimg = [point["nimg"] / 1000 for point in curve["points"]]
        axis.plot(kimg, [point[space] for point in curve["points"]], marker="o", label="Heun, 18")
        axis.axhline(curve["real"][space], color="grey", ls="--", label="real against real")
        axis.set(xlabel="thousand images", title=f"{space}: Frechet distance, %", ylim=(0, None))
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def card(curve: dict[str, Any], val_accuracy: float) -> str:
    """The card beside the files."""
    real, end = curve["real"], curve["points"][-1]
    before = min(curve["points"], key=lambda point: abs(point["nimg"] - 0.75 * end["nimg"]))
    rows = "\n".join(
        f"| {s} | {real[s]:.2f} | {end[s]:.2f} | {100 * (end[s] / before[s] - 1):+.1f}% |"
        for s in SPACES
    )
    return f"""# The digits model

`edm.safetensors`: an EDM denoiser (ADM UNet, 16 channels x 1, 2, 3) of scikit-learn's digits at
16 x 16, trained from random weights on digits/train (997 images) by `make pretrain-demo`
(`experiment=demo_pretrain`, {end["nimg"]} images seen); averaged weights.
sha256 {file_sha256(TEACHER)}

`classifier.safetensors`: the classifier whose 32 hidden units measure generated digits, trained on
the same images; {100 * val_accuracy:.1f}% right on digits/val.
sha256 {file_sha256(CLASSIFIER)}

Frechet distance to digits/val in % of the reference's variance, mean of 3 sets of 400 images,
Heun with {curve["heun_steps"]} steps:

| space | real images | this model | change over the last quarter of training |
|---|---|---|---|
{rows}

Data: UCI's Optical Recognition of Handwritten Digits (CC BY 4.0) as scikit-learn ships it. Weights:
Apache-2.0 like the project. The model exists to show the method on two cores, nothing else.
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo-pretrain"))
    parser.add_argument("overrides", nargs="*", help="key=value of experiment=demo_pretrain")
    args = parser.parse_args()
    overrides = ["experiment=demo_pretrain", f"run_dir={args.run_dir}", *args.overrides]
    pretrain(compose("pretrain", cfg.PretrainConfig, overrides))
    TEACHER.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(build.find_network(str(args.run_dir)), TEACHER)
    classifier = train_classifier(Digits("train"))
    save_classifier(classifier, CLASSIFIER)
    curve = learning_curve(args.run_dir)
    plot(curve, CURVE)
    (TEACHER.parent / "curve.json").write_text(json.dumps(curve, indent=1) + "\n")
    text = card(curve, accuracy(classifier, Digits("val")))
    (TEACHER.parent / "CARD.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_command(main)
