"""Fine-tunes the packaged digits model into a one-step generator and measures it: make demo.

Settings were chosen on the digits' `val` split; the rows printed are of `test`, seen only here.
With --study: over three seeds, beside its controls (make demo-study) or named variants of it; a run
that is done is not repeated.
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
from fastgan.checkpoint.network_file import load_network_file
from fastgan.common.errors import ArgumentParser, run_command
from fastgan.common.files import file_sha256, replace_atomically
from fastgan.data.dataset import Digits, Split
from fastgan.evaluation.classifiers import load_classifier
from fastgan.evaluation.features import PixelPca
from fastgan.evaluation.frechet import FeatureStatistics, frechet_distance
from fastgan.evaluation.protocol import versions
from fastgan.launch import build
from fastgan.launch.cli import compose, packaged_file
from fastgan.models import Precond
from fastgan.models.sampling import save_grid
from fastgan.train import train

TEACHER = Path(packaged_file("assets/digits/edm.safetensors"))
CLASSIFIER = Path(packaged_file("assets/digits/classifier.safetensors"))
HEUN_STEPS = (18, 32)
N = 400  # images on either side of every Frechet distance: the size of the split
DRAWS = 3  # disjoint sets of N images per row, whose distances are averaged
COLUMNS = 16
SPACES = ("classifier", "pca")
SEEDS = (42, 43, 44)
CPU = torch.device("cpu")
# Rows of the table; from `d2o_f` on the study's, of which the usual ones are the method's controls.
ROWS = {
    "real": "real against real",
    "untuned": "EDM model, one step, un-tuned",
    "heun": "EDM model, Heun {heun_steps} steps",
    "d2o_f": "D2O-F: convolutions frozen, one step",
    "fast": "D2O-F, `engine=fast`",
    "fresh_fakes": "D2O-F, `engine=fast share_fakes=false`",
    "bf16": "D2O-F, `engine=fast precision=bf16`",
    "fp16": "D2O-F, `engine=fast`, all parts in fp16",
    "d2o": "D2O: all parameters trained, one step",
    "random_weights": "the same GAN from random weights",
}
USUAL = ["d2o_f", "d2o", "random_weights"]


class Measure:
    """Frechet distance to one split in two feature spaces, in % of the reference's variance."""

    def __init__(self, split: Split) -> None:
        train_images = torch.from_numpy(Digits("train").all_images)
        self.extractors: dict[str, Callable[[Tensor], Tensor]] = {
            "classifier": load_classifier(CLASSIFIER),
            "pca": PixelPca.fit(train_images, 32),
        }
        images = torch.from_numpy(Digits(split).all_images)
        self.reference = {n: _moments(f(images).double()) for n, f in self.extractors.items()}

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Mean over the disjoint sets of N in uint8 `images` [k N, 1, 16, 16]."""
        assert len(images) % N == 0
        return {n: self.distance(n, f(images).double()) for n, f in self.extractors.items()}

    def distance(self, space: str, features: Tensor) -> float:
        """The same of features [k N, D] of one space."""
        mean, covariance = self.reference[space]
        sets = [frechet_distance(*_moments(part), mean, covariance) for part in features.split(N)]
        return 100 * statistics.mean(sets) / float(covariance.trace())


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


def demo(out: Path, split: Split, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Fine-tunes (resumed if it was interrupted), samples, measures; OUT/result.json, grid.png."""
    seconds: dict[str, float] = {}
    run_dir, few = out / "train", cfg.SamplerConfig()
    command = ["experiment=demo", f"run_dir={run_dir}"]
    with _timed(seconds, "fine-tune"):
        train(compose("train", cfg.TrainConfig, [*command, f"seed={seed}", *overrides]))
    with _timed(seconds, "sample"):
        # The pre-trained model asked for images in one step, with D2O's preconditioning.
        untuned = build.generator(compose("train", cfg.TrainConfig, command), Digits("train"))
        rows = {
            "real": real_images(),
            "untuned": generated(untuned.network.eval(), few),
            "d2o_f": generated(build.saved_network(str(run_dir), CPU)[0], few),
        }
        teacher = build.saved_network(str(TEACHER), CPU)[0]
        heuns = {k: generated(teacher, cfg.SamplerConfig("heun", k)) for k in HEUN_STEPS}
    with _timed(seconds, "measure"):
        measure = Measure(split)
        scores = {name: measure(images) for name, images in rows.items()}
        by_steps = {steps: measure(images) for steps, images in heuns.items()}
        # The better sampler is the harder opponent.
        best = min(by_steps, key=lambda steps: sum(by_steps[steps].values()))
        scores["heun"], rows["heun"] = by_steps[best], heuns[best]
    order = ("real", "untuned", "heun", "d2o_f")
    labels = ["real", "one step, un-tuned", f"Heun, {2 * best - 1} evaluations", "D2O-F, one step"]
    pictures = torch.cat([rows[name][:COLUMNS] for name in order])
    save_grid(pictures, out / "grid.png", COLUMNS, row_labels=labels, scale=3)
    result = {
        "rows": {name: scores[name] for name in order},
        "heun_steps": best,
        "n": N,
        "seeds": [seed],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "provenance": {
            "metric": f"Frechet distance, {DRAWS} sets of {N} images against digits/{split}",
            "unit": "% of the reference's total variance",
            "real": f"{DRAWS} random sets of {N} images of digits/train",
            "sample_seeds": f"0-{DRAWS * N - 1}",
            "teacher_sha256": file_sha256(TEACHER),
            "classifier_sha256": file_sha256(CLASSIFIER),
            "versions": versions(),
        },
    }
    _write(out / "result.json", result)
    return result


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    print(f"{name}: {seconds[name]:.0f} s", flush=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    with replace_atomically(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def variants() -> dict[str, list[str]]:
    """Name -> overrides of experiment=demo; from random weights D keeps the teacher's encoder."""
    source = load_network_file(TEACHER).config
    unet = ("model_type", "model_channels", "channel_mult", "num_blocks", "attn_resolutions")
    architecture = ",".join(f"{key}:{json.dumps(source[key])}" for key in unet)
    fast, parts = "engine=fast", ("generator", "backbones", "heads")
    return {
        "d2o_f": [],
        "fast": [fast],
        "fresh_fakes": [fast, "share_fakes=false"],
        "bf16": [fast, "precision=bf16"],
        "fp16": [fast, *(f"arithmetic.{part}=fp16" for part in parts)],
        "d2o": ["freeze.level=0"],
        "random_weights": [
            "init.path=null",
            f"init.network={{{architecture}}}",
            f"discriminator.network={TEACHER}",
            "freeze.level=0",
        ],
    }


def study(out: Path, names: list[str], overrides: list[str]) -> dict[str, Any]:
    """The demo of every variant and seed, each a folder in OUT, and over the seeds mean and
    standard deviation; OUT/summary.json."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        for seed in SEEDS:
            folder = out / f"{name}-{seed}"
            if not (folder / "result.json").exists():
                print(f"{name}, seed {seed}", flush=True)
                print(table(demo(folder, "test", seed, variants()[name] + overrides)), flush=True)
            runs[name].append(json.loads((folder / "result.json").read_text()))
    first = runs[names[0]][0]
    over_seeds = {n: {s: _over_seeds(results, s) for s in SPACES} for n, results in runs.items()}
    summary = {
        "rows": {n: first["rows"][n] for n in ("real", "untuned", "heun")} | over_seeds,
        "runs": {
            name: [{"seed": r["seeds"][0], **r["rows"]["d2o_f"]} for r in results]
            for name, results in runs.items()
        },
        "heun_steps": first["heun_steps"],
        "n": first["n"],
        "seeds": list(SEEDS),
        "provenance": first["provenance"],
    }
    _write(out / "summary.json", summary)
    return summary


def _over_seeds(results: list[dict[str, Any]], space: str) -> dict[str, float]:
    values = [result["rows"]["d2o_f"][space] for result in results]
    return {"mean": statistics.mean(values), "stdev": statistics.stdev(values)}


def table(result: dict[str, Any]) -> str:
    """The rows of a result, with what a reader wants to know, the excess over real-vs-real; or of
    a study, as the README shows them."""
    rows = result["rows"]
    lines = [["Frechet distance, % of variance", *SPACES]]
    for key in (key for key in ROWS if key in rows):
        lines.append([ROWS[key].format_map(result), *(_cell(rows[key][space]) for space in SPACES)])
    if "runs" not in result:
        ratios = (f"{excess_ratio(rows, space):.2f}x" for space in SPACES)
        lines.append(["excess over real, D2O-F : Heun", *ratios])
    text = [f"| {name:40} | {first:>15} | {second:>15} |" for name, first, second in lines]
    return "\n".join([text[0], f"|{'-' * 42}|{'-' * 17}|{'-' * 17}|", *text[1:]])


def _cell(value: float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.2f} +- {value['stdev']:.2f}"
    return f"{value:.2f}"


def excess_ratio(rows: dict[str, dict[str, float]], space: str) -> float:
    """(D2O-F - real) / (Heun - real): below 1 where one step is nearer the data than Heun."""
    real = rows["real"][space]
    return (rows["d2o_f"][space] - real) / (rows["heun"][space] - real)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: runs/demo, runs/demo-study")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("overrides", nargs="*", help="key=value of experiment=demo")
    parser.add_argument("--study", nargs="*", choices=list(ROWS)[3:], metavar="VARIANT")
    args = parser.parse_args()
    if args.study is not None:
        out = args.out or Path("runs/demo-study")
        print(table(study(out, args.study or USUAL, args.overrides)))
        return
    out = args.out or Path("runs/demo")
    print("\n" + table(demo(out, args.split, args.seed, args.overrides)))
    print(f"\n{out / 'result.json'}  {out / 'grid.png'}")


if __name__ == "__main__":
    run_command(main)
