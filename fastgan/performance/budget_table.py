"""Budgets as text: a table per experiment with its verdict, and what all of it stands on."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from fastgan.performance.budget import Budget, smallest
from fastgan.performance.counts import flop, norm_elements
from fastgan.performance.iteration import part_of
from fastgan.performance.machines import Assumptions

PARTS = ("backbone", "mixing", "heads")
HOURS = 6.0
CLAIM = ("A100", 8)
"""The published claim: 5 M images within `HOURS` hours on this machine."""
NOTES = (
    "precision=bf16: all products in bf16 on tensor cores; published: D's in float32 without them.",
    "GiB: at most, all images/GPU in one forward pass; '> memory' wants a smaller batch_gpu.",
    "Not in the hours: start, compilation, samples, measurements, checkpoints.",
)
HEADER = "  machine GPUs images/GPU   floor img/s  expected img/s  hours for 5 M  GiB per GPU"


def report(budgets: Sequence[Budget]) -> str:
    """The whole answer for budgets in the order of experiments."""
    lines = ["Computed from counts and the assumptions below; no speed here was measured.", ""]
    for _, group in groupby(budgets, lambda budget: budget.experiment):
        lines += [*_experiment(list(group)), ""]
    return "\n".join([*lines, *_assumptions(budgets)])


def _experiment(budgets: list[Budget]) -> Iterator[str]:
    first = budgets[0]
    counted, parameters = first.iteration, first.iteration.parameters
    d = counted.discriminator
    parts = {part: [x for x in d if part_of(x.name) == part] for part in PARTS}
    yield f"{first.experiment}: batch {first.batch}, precision={first.precision.value}"
    yield (
        f"  GFLOP per image: G {_giga(flop(counted.generator))} forward "
        f"(attention {_giga(flop(counted.generator, 'attention'))}), D {_giga(flop(d))} "
        f"({', '.join(f'{part} {_giga(flop(layers))}' for part, layers in parts.items())}), "
        f"iteration {_giga(counted.flop)}"
    )
    yield (
        f"  norms of G: {_mega(norm_elements(counted.generator))} M elements per image; trained: "
        f"{_mega(parameters.trained)} of {_mega(parameters.generator)} M parameters of G, "
        f"{_mega(parameters.heads)} M of the heads; "
        f"all-reduce {_mega(parameters.allreduce_bytes)} MB per iteration"
    )
    yield HEADER
    yield from map(_row, budgets)
    yield from _verdict(budgets)


def _row(budget: Budget) -> str:
    start = f"  {budget.machine.name:<7} {budget.gpus:>4}"
    if budget.problem:
        return f"{start}  {budget.problem}"
    memory = f"{budget.memory_gib()['peak']:.1f}"
    return (
        f"{start} {budget.batch_gpu:>10} {budget.floor_img_s:>13,.0f} "
        f"{budget.expected_img_s:>15,.0f} {budget.hours_5m:>14.2f} {memory:>12}"
        f"{'' if budget.fits_memory else ' > memory: batch_gpu'}"
    )


def _verdict(budgets: list[Budget]) -> Iterator[str]:
    for budget in budgets:
        if (budget.machine.name, budget.gpus) == CLAIM and budget.problem is None:
            fits = "fits" if budget.hours_5m <= HOURS else "does not fit"
            yield (
                f"  => {fits} {HOURS:g} hours on 8 x A100: {budget.hours_5m:.2f} h expected for "
                f"5 M images"
            )
    fewest = [_fewest(next(group)) for _, group in groupby(budgets, lambda b: b.machine)]
    yield f"  => fewest GPUs for {HOURS:g} hours: {', '.join(fewest)}"


def _fewest(example: Budget) -> str:
    found = smallest(example, HOURS)
    if found is None:
        return f"none of up to 64 {example.machine.name}"
    rounds = "" if found.fits_memory else ", smaller batch_gpu"
    return f"{found.gpus} x {found.machine.name} ({found.hours_5m:.1f} h{rounds})"


def _assumptions(budgets: Sequence[Budget]) -> Iterator[str]:
    """Those that differ between machines beside each other, then the others once."""
    by_machine = {b.machine.name: b.assumptions for b in budgets}
    yield "Assumptions (name, value, unit, source)"
    for name in next(iter(by_machine.values())):
        yield from _assumption(name, by_machine)
    yield from NOTES


def _assumption(name: str, by_machine: dict[str, Assumptions]) -> Iterator[str]:
    entries = {machine: assumed[name] for machine, assumed in by_machine.items()}
    same = len(set(entries.values())) == 1
    for machine, entry in list(entries.items())[: 1 if same else None]:
        where = "all" if same else machine
        yield f"  {name:<24} {where:<5} {entry.value:>10.4g} {entry.unit} ({entry.source})"


def _giga(count: float) -> str:
    return _short(count / 1e9)


def _mega(count: float) -> str:
    return _short(count / 1e6)


def _short(number: float) -> str:
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"
