"""Part `ablation`: from the published iteration to the fastest one, each row adding one thing.

What a row gains is its images per second over those of the row above, which took turns with it in
one process (rounds.py). A GPU does not hold all rows of the largest network at a time, so a case
has a few of them, and begins with the last row of the case before, built again.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.gpu_report import rounds
from benchmarks.gpu_report.parts import BESIDE, Case, module
from benchmarks.gpu_report.pictures import write_pictures
from benchmarks.gpu_report.results import Content, header
from benchmarks.gpu_report.speeds import described
from benchmarks.gpu_report.variants import Variant, nothing
from fastgan.common.errors import run_command
from fastgan.training.step import PlainStep

# Row -> the overrides that it adds to those of the rows above; `layout` is a hook.
ROWS = {
    "published": ("engine=plain", "kernels=library", "data.resident=false"),
    "layout": (),
    "precision": ("precision=bf16",),
    "compile": ("engine=compiled", "kernels=auto"),
    "kernels": ("engine=fast", "fast.graphs=false", "fast.fold=false"),
    "folded": ("fast.fold=true",),
    "graphs": ("fast.graphs=true",),
    "resident": ("data.resident=true",),
    "shared": ("share_fakes=true",),
}
# Experiment -> first and last row of a case, with its expected seconds. Rows from `graphs` on keep
# the memory of a whole iteration each: of ImageNet's two fit beside each other.
CASES = {
    "cifar10_uncond_d2o_f": {("published", "kernels"): 270, ("kernels", "shared"): 270},
    "imagenet64_d2o_f": {
        ("published", "compile"): 390,
        ("compile", "folded"): 420,
        ("folded", "graphs"): 180,
        ("graphs", "resident"): 150,
        ("resident", "shared"): 150,
    },
}
# A reading is of as many iterations as there are threads that decode, which come in step with each
# other: where the GPU waits for them, it does so once in so many iterations.
PACE = rounds.Pace(rounds=4, untimed=2, samples=2, each=4)
# Several epochs pass in a case; more pictures would only take longer to make.
PICTURES, FEW_PICTURES = 4096, 16


def cases(tiny: bool) -> list[Case]:
    """Named EXPERIMENT-LAST after their last row; a case goes on as those of `steps` do."""
    noted = f"{BESIDE}.progress.json"
    return [
        Case(
            "ablation",
            f"{experiment}-{last}",
            expected,
            module(
                "ablation",
                *("--experiment", experiment, "--rows", first, last, "--progress", noted),
                tiny=tiny,
            ),
            resumes=True,
        )
        for experiment, found in CASES.items()
        for (first, last), expected in found.items()
    ]


def channels_last(step: PlainStep) -> None:
    """Lays out the discriminator's weights, and by that all it computes, in NHWC."""
    step.discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def variants(first: str, last: str, data: Path | None = None) -> list[Variant]:
    """The rows from `first` to `last`, on the images of `data`."""
    names = list(ROWS)
    wanted = range(names.index(first), names.index(last) + 1)
    return [_variant(names[: index + 1], data) for index in wanted]


def _variant(names: list[str], data: Path | None) -> Variant:
    """The last of these rows: what it adds, and what those above do."""
    overrides = tuple(override for name in names for override in ROWS[name])
    return Variant(names[-1], overrides, channels_last if "layout" in names else nothing, data)


def measure(progress: rounds.Progress, first: str, last: str, tiny: bool) -> Content:
    """The case's content; Broken where a new process has to go on."""
    with tempfile.TemporaryDirectory(prefix="ablation-") as folder:
        data = Path(folder, "pictures.zip")
        config = variants(first, first)[0].config(progress.content["experiment"], None, tiny)
        shape = config.init.network
        write_pictures(
            data,
            FEW_PICTURES if tiny else PICTURES,
            resolution=shape["img_resolution"],
            channels=shape["img_channels"],
            label_dim=shape["label_dim"],
        )
        rounds.measure(progress, variants(first, last, data), PACE, tiny)
    return described(progress.content, list(progress.content["variants"]))


def merged(found: dict[str, Content]) -> Content:
    """Per experiment the bf16 product's rate of every case, and the rows that are there."""
    first = next(iter(found.values()))
    experiments: dict[str, Content] = {}
    for experiment in CASES:
        mine = {k: each for k, each in found.items() if each["experiment"] == experiment}
        if mine:
            rates = {name: each["matmul_rate"] for name, each in mine.items()}
            experiments[experiment] = {"matmul_rates": rates, "rows": table_rows(mine.values())}
    return {key: first[key] for key in header()} | {"experiments": experiments}


def table_rows(contents: Iterable[Content]) -> Content:
    """By row what was measured of it beside the row above (`above`), with what it gained over that
    (`gain`, of every round) and over `published` (`total`, the product of the gains), and its
    speed in the next case, which began with it (`again`)."""
    rows: Content = {}
    for name in ROWS:
        there = [each for each in contents if name in each["variants"]]
        # In the case that begins with it, it has no row above.
        there.sort(key=lambda each: next(iter(each["variants"])) == name)
        if there:
            rows[name] = there[0]["variants"][name] | _gain(there[0], name, rows)
            rows[name]["again"] = there[-1]["variants"][name].get("img_s") if there[1:] else None
    return rows


def _gain(content: Content, name: str, rows: Content) -> Content:
    """Over the nearest of the rows above that took turns with it in a case."""
    names = list(content["variants"])
    earlier = names[: names.index(name)]
    above = [other for other in earlier if name in content["ratios"].get(other, {})]
    if above:
        gain, before = content["ratios"][above[-1]][name], rows[above[-1]]["total"]
        total = None if before is None else before * gain["median"]
        return {"above": above[-1], "gain": gain, "total": total}
    begins = name == next(iter(ROWS)) and "img_s" in content["variants"][name]
    return {"above": None, "gain": None, "total": 1.0 if begins else None}


def main() -> int:
    parser = rounds.parser(__doc__, list(CASES))
    parser.add_argument("--rows", nargs=2, required=True, choices=list(ROWS), metavar="ROW")
    options = parser.parse_args()
    first, last = options.rows
    return rounds.run_case(options, lambda progress: measure(progress, first, last, options.tiny))


if __name__ == "__main__":
    run_command(main)
