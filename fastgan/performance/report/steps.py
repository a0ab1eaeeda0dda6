"""Part `steps`: iterations of a published experiment in every engine, taking turns in one process.

First every variant is built (random weights suffice), then come rounds in which each runs in turn,
so that whatever else happens on the machine happens to all. All is noted as it goes: a process that
was stopped builds again, repeats nothing that is noted, and goes on with the next round.
"""

import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from fastgan.errors import UserError, run_command
from fastgan.performance.report.parts import AGAIN, BESIDE, Case, module
from fastgan.performance.report.rates import product_rate
from fastgan.performance.report.results import (
    Content,
    case_parser,
    header,
    read_json,
    write_json,
)
from fastgan.performance.report.speeds import described
from fastgan.performance.report.timing import ON_GPU, timed
from fastgan.performance.report.variants import (
    Running,
    Variant,
    all_variants,
    build,
    restore_settings,
    take_settings,
)

T = TypeVar("T")
# Of the five published networks, with expected seconds; what differs most comes first.
EXPERIMENTS = {
    "cifar10_uncond_d2o_f": 240,
    "imagenet64_d2o_f": 420,
    "ffhq64_d2o_f": 300,
    "cifar10_cond_d2o_f": 240,
    "afhqv2_64_d2o_f": 300,
}
# With 3 iterations between two of R1 this makes 12 iterations and 4 of R1.
ROUNDS = 4
ITERATIONS = 3
# A set-up that was begun so often and never ended is not tried again.
ATTEMPTS = 2


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


class Progress:
    """What is known so far, on disk after every change."""

    def __init__(self, path: Path, experiment: str) -> None:
        self.path = path
        self.content: Content = {
            "experiment": experiment,
            "matmul_rates": [],
            "variants": {},
            "rounds": [],
        }
        if path.is_file():
            self.content = read_json(path)

    def variant(self, name: str) -> Content:
        """Its attempts, error and facts, to be changed and saved."""
        blank: Content = {"attempts": 0, "error": None, "out_of_memory": [], "facts": None}
        return self.content["variants"].setdefault(name, blank)

    def save(self) -> None:
        write_json(self.path, self.content)


class Broken(Exception):
    """A variant failed in a way after which this process is not to be trusted."""


def measure(experiment: str, progress: Progress, tiny: bool) -> Content:
    """The case's content; Broken where a new process has to go on."""
    if not tiny:
        progress.content["matmul_rates"].append(product_rate("bf16", tiny)["median"])
    start = take_settings()
    running: dict[str, Running] = {}
    for variant in all_variants():
        built = _set_up(variant, experiment, progress, tiny)
        restore_settings(start)
        if built is not None:
            running[variant.name] = built
    rounds, wanted = progress.content["rounds"], 1 if tiny else ROUNDS
    while len(rounds) < wanted and running:
        rounds.append(_round(running, len(rounds), progress, 1 if tiny else ITERATIONS))
        progress.save()
        print(f"round {len(rounds)} of {wanted}", flush=True)
    return described(progress.content)


def _set_up(variant: Variant, experiment: str, progress: Progress, tiny: bool) -> Running | None:
    """The variant settled, its batch halved once where memory does not suffice; None: it failed."""
    noted = progress.variant(variant.name)
    if noted["error"] is None and noted["facts"] is None:
        noted["attempts"] += 1
        if noted["attempts"] > ATTEMPTS:
            noted["error"] = f"its set-up did not end, {ATTEMPTS} times"
        progress.save()
    if noted["error"] is not None:
        return None
    print(f"{variant.name}: setting up", flush=True)
    for _ in range(2):
        batch = noted["out_of_memory"][-1] // 2 if noted["out_of_memory"] else None
        config = variant.config(experiment, batch, tiny)
        built = _guarded(partial(build, config), noted, progress, config.batch)
        if built is not None:
            noted["facts"] = noted["facts"] or built[1]
            progress.save()
            return built[0]
        if noted["error"] is not None:
            return None
    noted["error"] = f"out of memory with {' and '.join(map(str, noted['out_of_memory']))} images"
    progress.save()
    return None


def _guarded(call: Callable[[], T], noted: Content, progress: Progress, batch: int) -> T | None:
    """call(); None where memory did not suffice, or the variant cannot run, which is noted."""
    try:
        return call()
    except torch.OutOfMemoryError:
        noted["out_of_memory"].append(batch)
    except UserError as error:
        noted["error"] = str(error)
    except Exception as error:
        noted["error"] = _line(error)
        progress.save()
        raise Broken from error
    _free()
    progress.save()
    return None


def _round(
    running: dict[str, Running], index: int, progress: Progress, iterations: int
) -> dict[str, Content]:
    """Seconds of some iterations and of one with R1, of every variant; another one begins each
    time. A variant that fails is noted and leaves."""
    names = list(running)
    first = index % len(names)
    found: dict[str, Content] = {}
    for name in names[first:] + names[:first]:
        noted = progress.variant(name)
        turn = partial(_turn, running[name], index, iterations)
        taken = _guarded(turn, noted, progress, noted["facts"]["batch"])
        if taken is None:
            noted["error"] = noted["error"] or "out of memory beside the other variants"
            del running[name]
            _free()
        else:
            found[name] = {"iterations": taken[:-1], "r1": taken[-1]}
            noted["skipped_updates"] = running[name].skipped
    return found


def _turn(running: Running, index: int, iterations: int) -> list[float]:
    """One iteration without and then some with the clock, the last of them with R1."""
    before_r1 = (3 + index) * running.interval - iterations
    with running.turn():
        running.run(before_r1 - 1)
        numbers = range(before_r1, before_r1 + iterations + 1)
        return timed([partial(running.run, number) for number in numbers])


def _free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


def merged(found: dict[str, Content]) -> Content:
    first = next(iter(found.values()))
    return {key: first[key] for key in header()} | {"experiments": found}


def main() -> int:
    parser = case_parser(__doc__)
    parser.add_argument("--experiment", required=True, choices=list(EXPERIMENTS))
    parser.add_argument("--progress", type=Path, required=True, help="what is known so far")
    options = parser.parse_args()
    if not (ON_GPU or options.tiny):
        raise UserError("no GPU, on this machine, --tiny for a dry run would do")
    progress = Progress(options.progress, options.experiment)
    try:
        content = measure(options.experiment, progress, options.tiny)
    except Broken as broken:
        print(_line(broken.__cause__ or broken), file=sys.stderr)
        return AGAIN
    write_json(options.out, header() | content)
    options.progress.unlink()
    return 0


if __name__ == "__main__":
    run_command(main)
