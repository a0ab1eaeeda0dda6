"""Part `traces`: tools/profile_step.py on the smallest and the largest network, in every engine."""

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_report.parts import BESIDE, ROOT, Case, module
from benchmarks.gpu_report.results import Content, case_parser, header, read_json, write_json
from benchmarks.gpu_report.variants import Variant, all_variants
from fastgan.common.errors import UserError, run_command

EXPERIMENTS = {"cifar10_uncond_d2o_f": 60, "imagenet64_d2o_f": 120}
TOOL = "tools/profile_step.py"


def engines() -> dict[str, Variant]:
    """The first variant of each engine: plain in the authors' arithmetic, the others in bf16."""
    found: dict[str, Variant] = {}
    for variant in all_variants():
        found.setdefault(variant.name.partition("-")[0], variant)
    return found


def cases(tiny: bool) -> list[Case]:
    """A case per experiment and engine, whose files are in the folder of its name."""
    return [
        Case(
            "traces",
            f"{name}-{engine}",
            expected,
            module(
                "traces",
                *("--experiment", name, "--engine", engine, "--folder", BESIDE),
                tiny=tiny,
            ),
        )
        for name, expected in EXPERIMENTS.items()
        for engine in engines()
    ]


def profile(experiment: str, engine: str, folder: Path, tiny: bool) -> Content:
    """What the tool found, and the files it left. UserError: why it ended."""
    config = engines()[engine].config(experiment, None, tiny)
    words = [f"experiment={experiment}", f"engine={engine}", f"precision={config.precision.value}"]
    words += [f"kernels={config.kernels.value}", f"batch={config.batch}"]
    words += [f"batch_gpu={config.batch}", "--out", str(folder)]
    words += ["--tiny", "--iterations", "1", "--warmup", "1"] if tiny else ["--r1"]
    done = subprocess.run([sys.executable, TOOL, *words], cwd=ROOT)
    if done.returncode:
        raise UserError(f"ended with {done.returncode}, {TOOL}, 0 was expected")
    files = sorted(path.name for path in folder.iterdir())
    return {"files": files, "profile": read_json(folder / "profile.json")}


def merged(found: dict[str, Content]) -> Content:
    first = next(iter(found.values()))
    content: Content = {key: first[key] for key in header()}
    keys = ("files", "profile")
    return content | {"cases": {name: {k: each[k] for k in keys} for name, each in found.items()}}


def main() -> int:
    parser = case_parser(__doc__)
    parser.add_argument("--experiment", required=True, choices=list(EXPERIMENTS))
    parser.add_argument("--engine", required=True, choices=list(engines()))
    parser.add_argument("--folder", type=Path, required=True, help="for the trace and its table")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = profile(options.experiment, options.engine, options.folder, options.tiny)
    write_json(options.out, header() | found)
    return 0


if __name__ == "__main__":
    run_command(main)
