"""Fine-tunes the packaged digits model into a one-step generator and measures it: make demo.

Settings were chosen on the digits' `val` split; the rows printed are of `test`, seen only here.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan import config as cfg
from fastgan.common.errors import ArgumentParser, run_command
from fastgan.common.files import file_sha256, replace_atomically
from fastgan.data.dataset import Digits, Split
from fastgan.evaluation.classifiers import load_classifier
from fastgan.evaluation.features import PixelPca
from fastgan.evaluation.frechet import FeatureStatistics, frechet_distance
from fastgan.evaluation.grid import save_grid
from fastgan.evaluation.protocol import versions
from fastgan.launch import build
from fastgan.launch.cli import compose, packaged_file
from fastgan.models import Precond
from fastgan.train import train

TEACHER = Path(packaged_file("assets/digits/edm.safetensors"))
CLASSIFIER = Path(packaged_file("assets/digits/classifier.safetensors"))
HEUN_STEPS = (18, 32)
N = 400  # images on either side of every Frechet distance: the size of the split
DRAWS = 3  # disjoint sets of N images per row, whose distances are averaged
COLUMNS = 16
CPU = torch.device("cpu")


class Measure:
    """Frechet distance to one split in two feature spaces, in % of the reference's variance."""

    def __init__(self, split: Split) -> None:
        train_images = torch.from_numpy(Digits("train").all_images)
        self.extractors: dict[str, Callable[[Tensor], Tensor]] = {
            "classifier": load_classifier(CLASSIFIER),
            "pca": PixelPca.fit(train_images, 32),
        }
        self.reference = {}
        for name, images in self._features(torch.from_numpy(Digits(split).all_images)).items():
            self.reference[name] = _moments(images)

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Mean over the disjoint sets of N in uint8 `images` [k N, 1, 16, 16]."""
        assert len(images) % N == 0
        features = self._features(images)
        return {name: self._distance(name, values) for name, values in features.items()}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        return {name: extract(images).double() for name, extract in self.extractors.items()}

    def _distance(self, name: str, features: Tensor) -> float:
        mean, covariance = self.reference[name]
        distances = [
            frechet_distance(*_moments(part), mean, covariance) for part in features.split(N)
        ]
        return 100 * statistics.mean(distances) / float(covariance.trace())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    accumulated = FeatureStatistics(features.shape[1])
    accumulated.update(features)
    return accumulated.mean, accumulated.covariance


def real_images(seed: int = 0) -> Tensor:
    """DRAWS random sets of N training images: what a perfect generator would score."""
    images, rng = Digits("train").all_images, np.random.default_rng(seed)
    chosen = [rng.permutation(len(images))[:N] for _ in range(DRAWS)]
    return torch.from_numpy(images[np.concatenate(chosen)])


def generated(network: Precond, sampler: cfg.SamplerConfig) -> Tensor:
    """The images of seeds 0 ... DRAWS N - 1."""
    sample = build.sample_fn(network, sampler, CPU)
    return torch.cat([sample(list(range(k * N, (k + 1) * N))) for k in range(DRAWS)])


def fine_tune(run_dir: Path, overrides: list[str]) -> Precond:
    """`python -m fastgan.train experiment=demo`, resumed if it was interrupted."""
    config = compose(
        "train", cfg.TrainConfig, ["experiment=demo", f"run_dir={run_dir}", *overrides]
    )
    train(config)
    return build.saved_network(str(run_dir), CPU)[0]


def untuned_network() -> Precond:
    """The pre-trained model asked for images in one step, with D2O's preconditioning."""
    config = compose("train", cfg.TrainConfig, ["experiment=demo"])
    return build.generator(config, Digits("train")).network.eval()


def demo(out: Path, split: Split, seed: int, overrides: list[str]) -> dict[str, Any]:
    """All stages; writes OUT/result.json and OUT/grid.png and returns the result."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "fine-tune"):
        student = fine_tune(out / "train", [f"seed={seed}", *overrides])
    with _timed(seconds, "sample"):
        few = cfg.SamplerConfig()
        rows = {
            "real": real_images(),
            "untuned": generated(untuned_network(), few),
            "d2o_f": generated(student, few),
        }
        teacher = build.saved_network(str(TEACHER), CPU)[0]
        heuns = {k: generated(teacher, cfg.SamplerConfig("heun", k)) for k in HEUN_STEPS}
    with _timed(seconds, "measure"):
        measure = Measure(split)
        scores = {name: measure(images) for name, images in rows.items()}
        by_steps = {steps: measure(images) for steps, images in heuns.items()}
        # The better sampler is the harder opponent.
        best = min(by_steps, key=lambda steps: sum(by_steps[steps].values()))
        scores["heun"] = by_steps[best]
        rows["heun"] = heuns[best]
    order = ("real", "untuned", "heun", "d2o_f")
    result = {
        "rows": {name: scores[name] for name in order},
        "heun_steps": best,
        "n": N,
        "seeds": [seed],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "provenance": _provenance(split),
    }
    labels = ["real", "one step, un-tuned", f"Heun, {2 * best - 1} evaluations", "D2O-F, one step"]
    pictures = torch.cat([rows[name][:COLUMNS] for name in order])
    save_grid(pictures, out / "grid.png", COLUMNS, row_labels=labels, scale=3)
    with replace_atomically(out / "result.json") as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    return result


def table(result: dict[str, Any]) -> str:
    """The rows as text, with what a reader wants to know: the excess over real-vs-real."""
    names = {
        "real": "real against real",
        "untuned": "one step, un-tuned",
        "heun": f"EDM teacher, Heun {result['heun_steps']} steps",
        "d2o_f": "D2O-F, one step",
    }
    rows = result["rows"]
    lines = [f"{'Frechet distance, % of variance':34}{'classifier':>12}{'pixel PCA':>12}"]
    for key, name in names.items():
        lines.append(f"{name:34}{rows[key]['classifier']:12.2f}{rows[key]['pca']:12.2f}")
    ratios = {space: excess_ratio(rows, space) for space in ("classifier", "pca")}
    label = "excess over real, D2O-F : Heun"
    lines.append(f"{label:34}{ratios['classifier']:11.2f}x{ratios['pca']:11.2f}x")
    return "\n".join(lines)


def excess_ratio(rows: dict[str, dict[str, float]], space: str) -> float:
    """(D2O-F - real) / (Heun - real): below 1 where one step is nearer the data than Heun."""
    real = rows["real"][space]
    return (rows["d2o_f"][space] - real) / (rows["heun"][space] - real)


def _provenance(split: str) -> dict[str, Any]:
    return {
        "metric": f"Frechet distance, {DRAWS} sets of {N} images against digits/{split}",
        "unit": "% of the reference's total variance",
        "real": f"{DRAWS} random sets of {N} images of digits/train",
        "sample_seeds": f"0-{DRAWS * N - 1}",
        "teacher_sha256": file_sha256(TEACHER),
        "classifier_sha256": file_sha256(CLASSIFIER),
        "versions": versions(),
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    print(f"{name}: {seconds[name]:.0f} s", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("overrides", nargs="*", help="key=value of experiment=demo")
    args = parser.parse_args()
    result = demo(args.out, args.split, args.seed, args.overrides)
    print("\n" + table(result))
    print(f"\n{args.out / 'result.json'}  {args.out / 'grid.png'}")


if __name__ == "__main__":
    run_command(main)
