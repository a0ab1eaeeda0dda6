"""The registry: what the report consists of, case by case, with the time each should take."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_report.results import Content
from fastgan.common.errors import UserError

# Exit status: the case goes on in a new process.
AGAIN = 75
ROOT = Path(__file__).resolve().parents[2]
# In a command: the JSON file to write, and the same path without its ending for what else remains.
RESULT, BESIDE = "{result}", "{beside}"


@dataclass(frozen=True)
class Case:
    """One process whose result is one JSON file.

    `name` is "" where a part is a single case; `seconds`: expected on an H200; `command`: behind
    `python`; `accepted`: exit statuses that leave a result; `resumes`: stopped before its end, the
    process goes on where it was.
    """

    part: str
    name: str
    seconds: float
    command: tuple[str, ...]
    accepted: tuple[int, ...] = (0,)
    resumes: bool = False

    @property
    def label(self) -> str:
        return f"{self.part}/{self.name}" if self.name else self.part

    def result(self, out: Path) -> Path:
        """Where its result is once it is complete."""
        return out / f"{self.label}.json"

    def arguments(self, result: Path, out: Path) -> list[str]:
        """The whole command, which leaves its result in `result`."""
        places = {RESULT: str(result), BESIDE: str(out / self.label)}
        filled = list(self.command)
        for place, value in places.items():
            filled = [word.replace(place, value) for word in filled]
        return [sys.executable, *filled]


@dataclass(frozen=True)
class Part:
    """`cases(tiny)` to run in this order; `merged` makes one result of theirs, by case name.

    `asked_for`: it runs, and is missed, only where somebody names it.
    """

    name: str
    summary: str
    cases: Callable[[bool], list[Case]]
    merged: Callable[[dict[str, Content]], Content]
    asked_for: bool = False


def module(name: str, *words: str, tiny: bool) -> tuple[str, ...]:
    """The command of a case that is a module of this package."""
    small = ("--tiny",) if tiny else ()
    return ("-m", f"benchmarks.gpu_report.{name}", *words, "--out", RESULT, *small)


def all_parts() -> list[Part]:
    """In the order in which a machine's time is best spent."""
    from benchmarks.gpu_report import (
        ablation,
        cifar10,
        kernel_benchmarks,
        parity,
        rates,
        steps,
        traces,
    )

    def environment(tiny: bool) -> list[Case]:
        return [Case("environment", "", 10, module("environment", tiny=tiny))]

    return [
        Part("environment", "versions, device, memory, clocks", environment, lambda c: c[""]),
        Part("rates", "copy, matrix products, convolutions", rates.cases, rates.merged),
        Part("parity", "tests/kernels on the device", parity.cases, parity.merged),
        Part("kernels", "benchmarks/", kernel_benchmarks.cases, kernel_benchmarks.merged),
        Part("steps", "iterations in every engine", steps.cases, steps.merged),
        Part("traces", "tools/profile_step.py", traces.cases, traces.merged),
        Part("ablation", "what each idea gains", ablation.cases, ablation.merged),
        Part("cifar10", "a one-step generator from nothing", cifar10.cases, cifar10.merged, True),
    ]


def select(parts: Iterable[Part], wanted: list[str], tiny: bool) -> list[Case]:
    """The cases of PART or PART/CASE names; if there are none, of all parts that need not be asked
    for. UserError: an unknown name."""
    parts = list(parts)
    cases = [case for part in parts for case in part.cases(tiny)]
    for name in wanted:
        if not any(name in (case.part, case.label) for case in cases):
            raise UserError(
                f"no part {name}, --part, one of {', '.join(dict.fromkeys(c.part for c in cases))} "
                "or a case that --list prints would do"
            )
    names = set(wanted) or {part.name for part in parts if not part.asked_for}
    return [case for case in cases if {case.part, case.label} & names]
