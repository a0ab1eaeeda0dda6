"""What an experiment costs on a machine, computed from its counts and stated assumptions.

Two speeds. The floor: every product at `floor_efficiency` of the matrix rate, norms, optimisers and
EMA at full copy bandwidth, communication hidden, nothing else takes time. The expected one: every
layer takes the longest of its arithmetic, its memory traffic and `layer_seconds`; gradients are
averaged behind the backward pass; the GPU waits `idle_share` of the time. Both are of the iteration
that fastgan/training/step.py makes, without start, sampling, measuring or saving.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from fastgan import config as cfg
from fastgan.common.files import replace_atomically
from fastgan.common.libraries import import_pyplot
from fastgan.performance.iteration import Iteration, Part, Work, count_iteration, flop
from fastgan.performance.live_step import measured_config
from fastgan.performance.machines import (
    GPUS_PER_NODE,
    MACHINES,
    Assumptions,
    Machine,
    Measured,
    assumptions,
)

GPUS = (1, 8, 16, 32, 64)
IMAGES = 5_000_000
# Bytes per parameter and update: Adam reads the value, its gradient and two moments and writes all
# but the gradient, the check for finite gradients reads them once more; the EMA reads two, writes.
_ADAM, _EMA = 7 * 4 + 4, 3 * 4


@dataclass(frozen=True)
class Budget:
    """An experiment on a number of GPUs of one kind."""

    experiment: str
    machine: Machine
    gpus: int
    batch: int
    """Images per iteration over all GPUs."""
    precision: cfg.Precision
    iteration: Iteration
    assumptions: Assumptions

    @property
    def problem(self) -> str | None:
        """Why this number of GPUs cannot train the experiment, or None."""
        if self.batch % self.gpus:
            return f"batch {self.batch} does not split over {self.gpus} GPUs"
        return None

    @property
    def batch_gpu(self) -> int:
        assert self.problem is None
        return self.batch // self.gpus

    @property
    def floor_img_s(self) -> float:
        return self.batch / max(self._floor_seconds(), self._allreduce_seconds())

    @property
    def expected_img_s(self) -> float:
        busy = self._update_bytes / self._copy_rate + self._allreduce_seconds()
        busy += sum(map(self._layer_seconds, self.iteration.work))
        return self.batch * (1 - self._assumed("idle_share")) / busy

    @property
    def hours_5m(self) -> float:
        return IMAGES / self.expected_img_s / 3600

    def as_json(self) -> dict[str, object]:
        """One entry of `tools/budget.py --json`; speeds are null where the batch does not split."""
        counted = self.iteration
        speeds = ("batch_gpu", "floor_img_s", "expected_img_s", "hours_5m")
        return {
            "experiment": self.experiment,
            "machine": self.machine.name,
            "gpus": self.gpus,
            "batch": self.batch,
            "precision": self.precision.value,
            "computed": True,
            "g_forward_gflop": flop(counted.layers("generator")) / 1e9,
            "d_forward_gflop": flop(counted.layers("features", "heads")) / 1e9,
            "iteration_gflop": counted.flop / 1e9,
            "allreduce_bytes": counted.allreduce_bytes,
            **{name: None if self.problem else getattr(self, name) for name in speeds},
            "problem": self.problem,
            "assumptions": {k: asdict(a) for k, a in self.assumptions.items()},
        }

    def _assumed(self, name: str) -> float:
        return self.assumptions[name].value

    @property
    def _copy_rate(self) -> float:
        return self._assumed("copy_bandwidth") * self._assumed("copy_share")

    @property
    def _update_bytes(self) -> int:
        p = self.iteration
        return _ADAM * (p.trained + p.heads) + _EMA * p.trained

    def _width(self, part: Part) -> int:
        """Bytes of an activation."""
        strict = part != "generator" and self.precision is cfg.Precision.published
        return 4 if strict else 2

    def _rate(self, part: Part) -> float:
        """FLOP per second of the fastest products in this part's arithmetic."""
        return self._assumed("float32_rate" if self._width(part) == 4 else "matmul_rate")

    def _floor_seconds(self) -> float:
        """Of an iteration of one GPU."""
        products = moved = 0.0
        for work in self.iteration.work:
            layer = work.layer
            products += work.flop / self._rate(work.part) / self._assumed("floor_efficiency")
            if layer.kind == "norm":
                elements = work.forward * layer.moved + work.input_grad * layer.moved_back
                moved += self._width(work.part) * elements
        copied = self.batch_gpu * moved + self._update_bytes
        return self.batch_gpu * products + copied / self._assumed("copy_bandwidth")

    def _layer_seconds(self, work: Work) -> float:
        """All passes of a layer over this GPU's images."""
        layer, n = work.layer, self.batch_gpu
        forward, dgrad = (self._assumed(f"conv_{d}_efficiency") for d in ("forward", "dgrad"))
        sustained = self._rate(work.part) * self._assumed("sustained_share")
        # A norm's pass backward gives the gradients of its parameters as well.
        weight_grad = 0.0 if layer.kind == "norm" else work.weight_grad
        passes = (
            (work.forward, layer.flop, layer.moved, forward),
            (work.input_grad, layer.input_grad_flop, layer.moved_back, dgrad),
            (weight_grad, layer.flop, layer.moved_back, dgrad),
        )
        total = 0.0
        for count, products, elements, efficiency in passes:
            traffic = self._width(work.part) * (n * elements + layer.weights)
            total += count * max(
                n * products / (sustained * efficiency),
                traffic / self._copy_rate,
                self._assumed("layer_seconds"),
            )
        return total

    def _allreduce_seconds(self) -> float:
        """A ring over all GPUs, whose slowest link decides."""
        bandwidth = self._assumed("node_bandwidth")
        if self.gpus > GPUS_PER_NODE:
            bandwidth = min(bandwidth, self._assumed("network_bandwidth"))
        travelling = 2 * (self.gpus - 1) / self.gpus * self.iteration.allreduce_bytes
        return travelling / bandwidth


def budgets(
    experiment: str, overrides: Iterable[str], measured: Measured, gpus: Iterable[int] = GPUS
) -> list[Budget]:
    """Of configs/experiment/`experiment`.yaml in bf16 on every machine; `overrides` (key=value)
    come last. UserError: no such experiment or key."""
    config = measured_config(experiment, ["precision=bf16", *overrides])
    counted = count_iteration(config)
    return [
        Budget(experiment, m, n, config.batch, config.precision, counted, assumptions(m, measured))
        for m in MACHINES
        for n in gpus
    ]


def smallest(example: Budget, hours: float) -> Budget | None:
    """The fewest GPUs, up to a node's eight and then nodes, with which `example` takes `hours`."""
    for gpus in (*range(1, GPUS_PER_NODE), *range(GPUS_PER_NODE, GPUS[-1] + 1, GPUS_PER_NODE)):
        found = replace(example, gpus=gpus)
        if found.problem is None and found.hours_5m <= hours:
            return found
    return None


HOURS = 6.0
CLAIM = ("A100", 8)
"""The published claim: 5 M images within `HOURS` hours on this machine."""
NOTES = (
    "precision=bf16: all products in bf16 on tensor cores; published: D's in float32 without them.",
    "Not in the hours: start, compilation, samples, measurements, checkpoints.",
)
HEADER = "  machine GPUs images/GPU   floor img/s  expected img/s  hours for 5 M"


def report(budgets: Sequence[Budget]) -> str:
    """The whole answer for budgets in the order of experiments."""
    lines = ["Computed from counts and the assumptions below; no speed here was measured.", ""]
    for _, group in groupby(budgets, lambda budget: budget.experiment):
        lines += [*_experiment(list(group)), ""]
    return "\n".join([*lines, *_assumptions(budgets)])


def _experiment(budgets: list[Budget]) -> Iterator[str]:
    first = budgets[0]
    counted = first.iteration
    g, frozen, heads = (counted.layers(part) for part in ("generator", "features", "heads"))
    norms = sum(layer.moved // 2 for layer in g if layer.kind == "norm")
    yield f"{first.experiment}: batch {first.batch}, precision={first.precision.value}"
    yield (
        f"  GFLOP per image: G {_short(flop(g) / 1e9)} forward "
        f"(attention {_short(flop(g, 'attention') / 1e9)}), D {_short(flop(frozen + heads) / 1e9)} "
        f"(frozen {_short(flop(frozen) / 1e9)}, heads {_short(flop(heads) / 1e9)}), "
        f"iteration {_short(counted.flop / 1e9)}"
    )
    yield (
        f"  norms of G: {_short(norms / 1e6)} M elements per image; trained: "
        f"{_short(counted.trained / 1e6)} of {_short(counted.parameters / 1e6)} M parameters of G, "
        f"{_short(counted.heads / 1e6)} M of the heads; "
        f"all-reduce {_short(counted.allreduce_bytes / 1e6)} MB per iteration"
    )
    yield HEADER
    yield from map(_row, budgets)
    for budget in budgets:
        if (budget.machine.name, budget.gpus) == CLAIM and budget.problem is None:
            fits = "fits" if budget.hours_5m <= HOURS else "does not fit"
            yield (
                f"  => {fits} {HOURS:g} hours on 8 x A100: {budget.hours_5m:.2f} h expected for "
                "5 M images"
            )
    fewest = [_fewest(next(group)) for _, group in groupby(budgets, lambda b: b.machine)]
    yield f"  => fewest GPUs for {HOURS:g} hours: {', '.join(fewest)}"


def _row(budget: Budget) -> str:
    start = f"  {budget.machine.name:<7} {budget.gpus:>4}"
    if budget.problem:
        return f"{start}  {budget.problem}"
    return (
        f"{start} {budget.batch_gpu:>10} {budget.floor_img_s:>13,.0f} "
        f"{budget.expected_img_s:>15,.0f} {budget.hours_5m:>14.2f}"
    )


def _fewest(example: Budget) -> str:
    found = smallest(example, HOURS)
    if found is None:
        return f"none of up to 64 {example.machine.name}"
    return f"{found.gpus} x {found.machine.name} ({found.hours_5m:.1f} h)"


def _assumptions(budgets: Sequence[Budget]) -> Iterator[str]:
    """Those that differ between machines beside each other, then the others once."""
    by_machine = {b.machine.name: b.assumptions for b in budgets}
    yield "Assumptions (name, value, unit, source)"
    for name in budgets[0].assumptions:
        entries = {machine: assumed[name] for machine, assumed in by_machine.items()}
        if len(set(entries.values())) == 1:
            entries = {"all": budgets[0].assumptions[name]}
        for where, entry in entries.items():
            yield f"  {name:<24} {where:<5} {entry.value:>10.4g} {entry.unit} ({entry.source})"
    yield from NOTES


def _short(number: float) -> str:
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart without.
STYLES = {"A100": ("#D55E00", "o"), "H100": ("#0072B2", "s"), "H200": ("#009E73", "^")}


def save_plot(budgets: Sequence[Budget], path: Path) -> None:
    """Writes a PNG. UserError: matplotlib is not installed, `path` cannot be written."""
    plt = import_pyplot("--plot")
    groups = [list(group) for _, group in groupby(budgets, lambda budget: budget.experiment)]
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows + 0.8), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, group in zip(axes.flat, groups, strict=False):
        _panel(axis, group)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.supxlabel("GPUs")
    figure.supylabel("hours")
    figure.suptitle(
        f"Hours for 5 M images, precision={budgets[0].precision.value}: "
        "computed from counts and assumptions, not measured",
        fontsize=11,
    )
    try:
        with replace_atomically(path) as file:
            figure.savefig(file, format="png", dpi=120)
    finally:
        plt.close(figure)


def _panel(axis: Any, budgets: list[Budget]) -> None:
    """One experiment: expected hours as lines, the floor's as dots below them."""
    for name, group in groupby(budgets, lambda budget: budget.machine.name):
        points = [budget for budget in group if budget.problem is None]
        gpus = [budget.gpus for budget in points]
        colour, marker = STYLES[name]
        hours = [budget.hours_5m for budget in points]
        axis.plot(gpus, hours, color=colour, marker=marker, markersize=5, label=name)
        floor = [IMAGES / budget.floor_img_s / 3600 for budget in points]
        axis.plot(gpus, floor, color=colour, linestyle=":", linewidth=1, label=f"{name}'s floor")
    axis.axhline(HOURS, color="black", linestyle="--", linewidth=1, label=f"{HOURS:g} hours")
    axis.set_title(budgets[0].experiment, fontsize=10)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.set_xticks(sorted({budget.gpus for budget in budgets}), minor=False)
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.tick_params(labelbottom=True)
