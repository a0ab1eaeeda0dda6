"""Variants of a published experiment's iteration, taking turns in one process.

First every variant is built (random weights suffice), then come rounds in which each runs in turn,
so that whatever else happens on the machine happens to all. All is noted as it goes: a process that
was stopped builds again, repeats nothing that is noted, and goes on with the next round.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from fastgan.errors import ArgumentParser, UserError
from fastgan.performance.report.parts import AGAIN
from fastgan.performance.report.rates import product_rate
from fastgan.performance.report.results import (
    Content,
    case_parser,
    header,
    read_json,
    write_json,
)
from fastgan.performance.report.timing import ON_GPU, timed
from fastgan.performance.report.variants import (
    Running,
    Variant,
    build,
    restore_settings,
    take_settings,
)

T = TypeVar("T")
# A set-up that was begun so often and never ended is not tried again.
ATTEMPTS = 2


@dataclass(frozen=True)
class Pace:
    """What a variant runs in its turns: iterations without the clock, `samples` with it (of `each`
    iterations in a row, their mean), and one with R1."""

    rounds: int
    untimed: int
    samples: int
    each: int = 1


TRIAL = Pace(rounds=1, untimed=1, samples=1)


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


def parser(description: str | None, experiments: Sequence[str]) -> ArgumentParser:
    """The arguments of a case whose variants take turns."""
    found = case_parser(description)
    found.add_argument("--experiment", required=True, choices=list(experiments))
    found.add_argument("--progress", type=Path, required=True, help="what is known so far")
    return found


def run_case(options: argparse.Namespace, measured: Callable[[Progress], Content]) -> int:
    """Writes the case's content; AGAIN where a new process has to go on."""
    if not (ON_GPU or options.tiny):
        raise UserError("no GPU, on this machine, --tiny for a dry run would do")
    try:
        content = measured(Progress(options.progress, options.experiment))
    except Broken as broken:
        print(_line(broken.__cause__ or broken), file=sys.stderr)
        return AGAIN
    write_json(options.out, header() | content)
    options.progress.unlink()
    return 0


def measure(progress: Progress, variants: Sequence[Variant], pace: Pace, tiny: bool) -> None:
    """Notes every variant's facts and the rounds; Broken where a new process has to go on."""
    if not tiny:
        progress.content["matmul_rates"].append(product_rate("bf16", tiny)["median"])
    start, pace = take_settings(), TRIAL if tiny else pace
    running: dict[str, Running] = {}
    with ExitStack() as stack:
        for variant in variants:
            built = _set_up(variant, progress, tiny, stack)
            restore_settings(start)
            if built is not None:
                running[variant.name] = built
        rounds = progress.content["rounds"]
        while len(rounds) < pace.rounds and running:
            rounds.append(_round(running, len(rounds), progress, pace))
            progress.save()
            print(f"round {len(rounds)} of {pace.rounds}", flush=True)


def _set_up(variant: Variant, progress: Progress, tiny: bool, stack: ExitStack) -> Running | None:
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
        config = variant.config(progress.content["experiment"], batch, tiny)
        call = partial(build, config, variant.prepare, stack)
        built = _guarded(call, noted, progress, config.batch)
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
    running: dict[str, Running], index: int, progress: Progress, pace: Pace
) -> dict[str, Content]:
    """Seconds of some iterations and of one with R1, of every variant; another one begins each
    time. A variant that fails is noted and leaves."""
    names = list(running)
    first = index % len(names)
    found: dict[str, Content] = {}
    for name in names[first:] + names[:first]:
        noted = progress.variant(name)
        turn = partial(_turn, running[name], index, pace)
        taken = _guarded(turn, noted, progress, noted["facts"]["batch"])
        if taken is None:
            noted["error"] = noted["error"] or "out of memory beside the other variants"
            del running[name]
            _free()
        else:
            found[name] = {"iterations": taken[:-1], "r1": taken[-1]}
            noted["skipped_updates"] = running[name].skipped
    return found


def _turn(running: Running, index: int, pace: Pace) -> list[float]:
    """Seconds of iterations, as the pace has it, the last one with R1."""
    r1 = (3 + index) * running.interval
    clocked = pace.samples * pace.each
    assert pace.untimed + clocked < running.interval

    def some(start: int) -> None:
        for number in range(start, start + pace.each):
            running.run(number)

    with running.turn():
        for number in range(r1 - clocked - pace.untimed, r1 - clocked):
            running.run(number)
        starts = range(r1 - clocked, r1, pace.each)
        taken = timed([*(partial(some, start) for start in starts), partial(running.run, r1)])
    return [seconds / pace.each for seconds in taken[:-1]] + taken[-1:]


def _free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]
