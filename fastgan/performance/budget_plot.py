"""Hours for 5 M images against the number of GPUs: a panel per experiment, a line per machine."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fastgan.files import replace_atomically
from fastgan.performance.budget import Budget
from fastgan.performance.budget_table import HOURS
from fastgan.performance.pyplot import import_pyplot

# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart without.
STYLES = {"A100": ("#D55E00", "o"), "H100": ("#0072B2", "s"), "H200": ("#009E73", "^")}
_COLUMNS = 3


def save_plot(budgets: Sequence[Budget], path: Path) -> None:
    """Writes a PNG. UserError: matplotlib is not installed, `path` cannot be written."""
    plt = import_pyplot("--plot")
    groups = [list(group) for _, group in groupby(budgets, lambda budget: budget.experiment)]
    columns = min(_COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows + 0.8), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, group in zip(axes.flat, groups, strict=False):
        _panel(axis, group)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    _label(figure, axes, len(groups))
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
        floor = [h * b.expected_img_s / b.floor_img_s for h, b in zip(hours, points, strict=True)]
        axis.plot(gpus, floor, color=colour, linestyle=":", linewidth=1)
    axis.axhline(HOURS, color="black", linestyle="--", linewidth=1)
    axis.set_title(budgets[0].experiment, fontsize=10)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.set_xticks(sorted({budget.gpus for budget in budgets}))
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_locator(_nowhere())
    axis.yaxis.set_major_formatter("{x:g}")


def _nowhere() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _label(figure: Any, axes: Any, panels: int) -> None:
    """Axis labels at the outside, one legend for all panels."""
    from matplotlib.lines import Line2D

    handles, _ = axes.flat[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="grey", linestyle=":", linewidth=1, label="floor"))
    handles.append(
        Line2D([], [], color="black", linestyle="--", linewidth=1, label=f"{HOURS:g} hours")
    )
    columns = axes.shape[1]
    for index, axis in enumerate(axes.flat[:panels]):
        if index % columns == 0:
            axis.set_ylabel("hours")
        if index + columns >= panels:
            axis.set_xlabel("GPUs")
            axis.tick_params(labelbottom=True)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
