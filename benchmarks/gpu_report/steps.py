"""Part `steps`: iterations of the published experiments in every engine, as rounds.py measures."""

from benchmarks.gpu_report import rounds
from benchmarks.gpu_report.parts import BESIDE, Case, module
from benchmarks.gpu_report.results import Content, header
from benchmarks.gpu_report.speeds import described
from benchmarks.gpu_report.variants import BASELINES, all_variants
from fastgan.common.errors import run_command

# Of the five published networks, with expected seconds; what differs most comes first.
EXPERIMENTS = {
    "cifar10_uncond_d2o_f": 240,
    "imagenet64_d2o_f": 420,
    "ffhq64_d2o_f": 300,
    "cifar10_cond_d2o_f": 240,
    "afhqv2_64_d2o_f": 300,
}
# With 3 iterations between two of R1 this makes 12 iterations and 4 of R1.
PACE = rounds.Pace(rounds=4, untimed=1, samples=3)


def cases(tiny: bool) -> list[Case]:
    """A case per experiment; its variants and rounds are noted in NAME.progress.json."""
    noted = f"{BESIDE}.progress.json"
    return [
        Case(
            "steps",
            name,
            expected,
            module("steps", "--experiment", name, "--progress", noted, tiny=tiny),
            resumes=True,
        )
        for name, expected in EXPERIMENTS.items()
    ]


def measure(progress: rounds.Progress, tiny: bool) -> Content:
    """The case's content; Broken where a new process has to go on."""
    rounds.measure(progress, all_variants(), PACE, tiny)
    return described(progress.content, BASELINES)


def merged(found: dict[str, Content]) -> Content:
    first = next(iter(found.values()))
    return {key: first[key] for key in header()} | {"experiments": found}


def main() -> int:
    options = rounds.parser(__doc__, list(EXPERIMENTS)).parse_args()
    return rounds.run_case(options, lambda progress: measure(progress, options.tiny))


if __name__ == "__main__":
    run_command(main)
