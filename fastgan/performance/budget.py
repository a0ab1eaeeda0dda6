"""What an experiment costs on a machine, computed from its counts and stated assumptions.

Two speeds. The floor: every product at `floor_efficiency` of the matrix rate, norms, optimisers and
EMA at full copy bandwidth, communication hidden, nothing else takes time. The expected one: every
layer takes the longest of its arithmetic, its memory traffic and `layer_seconds`; gradients are
averaged behind the backward pass; the GPU waits `idle_share` of the time. Both are of the iteration
that fastgan/training/step.py makes, without start, sampling, measuring or saving.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from fastgan import config as cfg
from fastgan.common.files import replace_atomically
from fastgan.common.libraries import import_pyplot
from fastgan.performance.iteration import Iteration, Part, Work, count_iteration, flop
from fastgan.performance.live_step import measured_config
from fastgan.performance.machines import GPUS_PER_NODE, MACHINES, Machine, assumptions

GPUS = (1, 8, 16, 32, 64)
IMAGES = 5_000_000
HOURS = 6.0
"""The published claim, with `IMAGES` images on 8 A100."""
# Bytes per parameter and update: Adam reads the value, its gradient and two moments and writes all
# but the gradient, the check for finite gradients reads them once more; the EMA reads two, writes.
_ADAM, _EMA = 7 * 4 + 4, 3 * 4

Row = dict[str, Any]
"""An experiment on a number of GPUs of one kind: an entry of `tools/budget.py --json`."""


@dataclass(frozen=True)
class Model:
    """The time that an iteration of `images` images on each of `gpus` GPUs takes."""

    iteration: Iteration
    precision: cfg.Precision
    gpus: int
    images: int
    assumed: dict[str, float]

    def floor_seconds(self) -> float:
        """The least; the all-reduce is hidden where it is not the longest."""
        products = moved = 0.0
        for work in self.iteration.work:
            layer = work.layer
            products += work.flop / self._rate(work.part) / self.assumed["floor_efficiency"]
            if layer.kind == "norm":
                elements = work.forward * layer.moved + work.input_grad * layer.moved_back
                moved += self._width(work.part) * elements
        copied = self.images * moved + self._update_bytes()
        busy = self.images * products + copied / self.assumed["copy_bandwidth"]
        return max(busy, self._allreduce_seconds())

    def expected_seconds(self) -> float:
        """What a good engine should take."""
        busy = self._update_bytes() / self._copy_rate() + self._allreduce_seconds()
        busy += sum(map(self._layer_seconds, self.iteration.work))
        return busy / (1 - self.assumed["idle_share"])

    def _layer_seconds(self, work: Work) -> float:
        """All passes of a layer over this GPU's images."""
        layer, n = work.layer, self.images
        forward, dgrad = (self.assumed[f"conv_{d}_efficiency"] for d in ("forward", "dgrad"))
        sustained = self._rate(work.part) * self.assumed["sustained_share"]
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
                traffic / self._copy_rate(),
                self.assumed["layer_seconds"],
            )
        return total

    def _width(self, part: Part) -> int:
        """Bytes of an activation."""
        strict = part != "generator" and self.precision is cfg.Precision.published
        return 4 if strict else 2

    def _rate(self, part: Part) -> float:
        """FLOP per second of the fastest products in this part's arithmetic."""
        return self.assumed["float32_rate" if self._width(part) == 4 else "matmul_rate"]

    def _copy_rate(self) -> float:
        return self.assumed["copy_bandwidth"] * self.assumed["copy_share"]

    def _update_bytes(self) -> int:
        p = self.iteration
        return _ADAM * (p.trained + p.heads) + _EMA * p.trained

    def _allreduce_seconds(self) -> float:
        """A ring over all GPUs, whose slowest link decides."""
        bandwidth = self.assumed["node_bandwidth"]
        if self.gpus > GPUS_PER_NODE:
            bandwidth = min(bandwidth, self.assumed["network_bandwidth"])
        return 2 * (self.gpus - 1) / self.gpus * self.iteration.allreduce_bytes / bandwidth


def budgets(experiment: str, overrides: Iterable[str]) -> list[Row]:
    """Of configs/experiment/`experiment`.yaml in bf16 on every machine; `overrides` (key=value)
    come last. UserError: no such experiment or key."""
    config = measured_config(experiment, ["precision=bf16", *overrides])
    counted = count_iteration(config)
    return [
        {"experiment": experiment, **_row(config, counted, machine, gpus)}
        for machine in MACHINES
        for gpus in GPUS
    ]


def _row(config: cfg.TrainConfig, counted: Iteration, machine: Machine, gpus: int) -> Row:
    """Speeds are None where the batch does not split."""
    batch, assumed = config.batch, assumptions(machine)
    batch_gpu = floor = expected = hours = problem = None
    if batch % gpus:
        problem = f"batch {batch} does not split over {gpus} GPUs"
    else:
        batch_gpu, values = batch // gpus, {name: a.value for name, a in assumed.items()}
        model = Model(counted, config.precision, gpus, batch_gpu, values)
        floor, expected = batch / model.floor_seconds(), batch / model.expected_seconds()
        hours = IMAGES / expected / 3600
    return {
        "machine": machine.name,
        "gpus": gpus,
        "batch": batch,
        "precision": config.precision.value,
        "computed": True,
        "g_forward_gflop": flop(counted.layers("generator")) / 1e9,
        "d_forward_gflop": flop(counted.layers("features", "heads")) / 1e9,
        "iteration_gflop": counted.flop / 1e9,
        "allreduce_bytes": counted.allreduce_bytes,
        "batch_gpu": batch_gpu,
        "floor_img_s": floor,
        "expected_img_s": expected,
        "hours_5m": hours,
        "problem": problem,
        "assumptions": {name: a._asdict() for name, a in assumed.items()},
    }


def report(rows: Sequence[Row]) -> str:
    """A table of all rows, then what they presume."""
    lines = [
        f"Computed from counts and the assumptions below (precision={rows[0]['precision']}); "
        "no speed here was measured.\n",
        f"{'experiment':<22} machine GPUs images/GPU floor img/s expected img/s hours for 5 M",
    ]
    for row in rows:
        cells = "{batch_gpu:>10} {floor_img_s:>11,.0f} {expected_img_s:>14,.0f} {hours_5m:>13.2f}"
        told = row["problem"] or cells.format_map(row)
        lines.append(f"{row['experiment']:<22} {row['machine']:<7} {row['gpus']:>4} {told}")
    by_machine = {row["machine"]: row["assumptions"] for row in rows}
    lines.append(f"\n{'assumption':<24}" + "".join(f"{name:>10}" for name in by_machine))
    for name, first in rows[0]["assumptions"].items():
        values = "".join(f"{assumed[name]['value']:>10.4g}" for assumed in by_machine.values())
        lines.append(f"{name:<24}{values} {first['unit']} ({first['source']})")
    return "\n".join(lines)


# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart without.
STYLES = {"A100": ("#D55E00", "o"), "H100": ("#0072B2", "s"), "H200": ("#009E73", "^")}


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG. UserError: matplotlib is not installed, `path` cannot be written."""
    plt = import_pyplot("--plot")
    groups = [list(group) for _, group in groupby(rows, itemgetter("experiment"))]
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = plt.figure(figsize=(4.2 * columns, 3.4 * lines + 0.8), layout="constrained")
    axis = None
    for index, group in enumerate(groups, 1):
        axis = figure.add_subplot(lines, columns, index, sharey=axis)
        _panel(axis, group)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(
        f"Hours for 5 M images, precision={rows[0]['precision']}: "
        "computed from counts and assumptions, not measured",
        fontsize=11,
    )
    try:
        with replace_atomically(path) as file:
            figure.savefig(file, format="png", dpi=120)
    finally:
        plt.close(figure)


def _panel(axis: Any, rows: list[Row]) -> None:
    """One experiment: expected hours as lines, the floor's as dots below them."""
    for name, group in groupby(rows, itemgetter("machine")):
        points = [row for row in group if row["problem"] is None]
        gpus = [row["gpus"] for row in points]
        colour, marker = STYLES[name]
        hours = [row["hours_5m"] for row in points]
        axis.plot(gpus, hours, color=colour, marker=marker, markersize=5, label=name)
        floor = [IMAGES / row["floor_img_s"] / 3600 for row in points]
        axis.plot(gpus, floor, color=colour, linestyle=":", linewidth=1, label=f"{name}'s floor")
    axis.axhline(HOURS, color="black", linestyle="--", linewidth=1, label=f"{HOURS:g} hours")
    axis.set(title=rows[0]["experiment"], xlabel="GPUs", ylabel="hours", yscale="log")
    axis.set_xscale("log", base=2)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.set_xticks(GPUS, list(map(str, GPUS)))
    axis.yaxis.set_major_formatter("{x:g}")
