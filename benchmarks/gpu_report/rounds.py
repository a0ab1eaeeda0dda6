"""Variants of a published experiment's iteration, taking turns in one process.

First every variant is built (random weights suffice), then come rounds in which each runs in turn,
so that whatever else happens on the machine happens to all. All is noted as it goes: a process that
was stopped builds again, repeats nothing that is noted, and goes on with the next round.
"""

import argparse
import faulthandler
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer
from typing import NoReturn, TypeVar

import torch

from benchmarks.gpu_report.parts import AGAIN
from benchmarks.gpu_report.rates import product_rate
from benchmarks.gpu_report.results import Content, case_parser, header, read_json, write_json
from benchmarks.gpu_report.timing import ON_GPU, timed
from benchmarks.gpu_report.variants import Running, Variant, build, restore_settings, take_settings
from fastgan.common.errors import ArgumentParser, UserError, out_of_memory

T = TypeVar("T")
# A set-up that was begun so often and never ended is not tried again.
ATTEMPTS = 2
# A set-up that takes longer hangs, or compiles for long: the second attempt finds what the first
# one compiled, and has half of it.
SET_UP_SECONDS = 420.0
TURN_SECONDS = 60.0


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
        blank["first_turn"] = None
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
    except Broken:
        _leave()
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
                _first_turn(variant.name, running, progress, pace)
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
    for _ in range(2 - len(noted["out_of_memory"])):
        batch = noted["out_of_memory"][-1] // 2 if noted["out_of_memory"] else None
        config = variant.config(progress.content["experiment"], batch, tiny)
        call = partial(build, config, variant.prepare, stack)
        limit = SET_UP_SECONDS / noted["attempts"]
        built = _guarded(call, noted, progress, config.batch, limit)
        if built is not None:
            noted["facts"] = noted["facts"] or built[1]
            progress.save()
            return built[0]
        if noted["error"] is not None:
            return None
    noted["error"] = f"out of memory with {' and '.join(map(str, noted['out_of_memory']))} images"
    progress.save()
    return None


def _guarded(
    call: Callable[[], T], noted: Content, progress: Progress, batch: int, limit: float
) -> T | None:
    """call(); None where memory did not suffice, or the variant cannot run, which is noted.

    Broken where the process is not to be trusted: after errors of the device, and of recording.
    """
    try:
        with _watched(noted, progress, limit):
            return call()
    except Exception as error:
        traceback.print_exc()
        if out_of_memory(error):
            noted["out_of_memory"].append(batch)
        else:
            noted["error"] = str(error) if isinstance(error, UserError) else _line(error)
        progress.save()
        known = isinstance(error, torch.OutOfMemoryError | UserError)
        if not known or error.__cause__ is not None:
            raise Broken from error
    _free()
    return None


@contextmanager
def _watched(noted: Content, progress: Progress, limit: float) -> Iterator[None]:
    """Inside, no more than `limit` seconds pass: no exception comes from a GPU that hangs. What
    every thread did is printed, and a new process goes on, without a variant that had settled."""

    def end() -> None:
        print(f"did not end in {limit:.0f} s", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2)
        if noted["facts"] is not None:
            noted["error"] = f"did not end in {limit:.0f} s"
            progress.save()
        _leave()

    timer = Timer(limit, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave() -> NoReturn:
    """Ends the process at once, for a new one: with a broken GPU Python's own end may hang."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(AGAIN)


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
        taken = _guarded(turn, noted, progress, noted["facts"]["batch"], TURN_SECONDS)
        if taken is None:
            noted["error"] = noted["error"] or "out of memory beside the other variants"
            del running[name]
            _free()
        else:
            found[name] = {"iterations": taken[:-1], "r1": taken[-1]}
            noted["skipped_updates"] = running[name].skipped
    return found


def _first_turn(name: str, running: dict[str, Running], progress: Progress, pace: Pace) -> None:
    """Notes a turn right after the set-up: all that is known where time ends before the rounds."""
    noted = progress.variant(name)
    if noted.get("first_turn") is None:
        found = _round({name: running[name]}, 0, progress, pace)
        if name in found:
            noted["first_turn"] = found[name]
            progress.save()
        else:
            del running[name]


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
    """Broken where a recording that broke off has left the allocator or the generator behind."""
    gc.collect()
    if ON_GPU:
        try:
            torch.cuda.empty_cache()
            torch.rand(1, device="cuda").item()
        except RuntimeError as error:
            raise Broken from error


def _line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]
