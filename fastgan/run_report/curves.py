"""Charts as inline SVG: matplotlib's, without what belongs to a file of its own.

No text of a run gets into a drawing: names and legends are HTML.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgan.common.libraries import import_pyplot
from fastgan.config import DiscriminatorKind, LossKind
from fastgan.discriminator.base import Discriminator
from fastgan.run_report.statistics import MEMORY, METRIC, MFU, SKIPPED, SPEED, Series, Statistics
from fastgan.training.monitor import LEAST_DIVERSITY, MAX_SKIPPED, SURE


@dataclass(frozen=True)
class Chart:
    """One panel: `keys` of the statistics, a sentence, dotted lines (value, what it means)."""

    title: str
    keys: tuple[str, ...]
    says: str
    lines: tuple[tuple[float, str], ...] = ()
    log: bool = False
    from_zero: bool = False


def undecided(config: dict[str, Any]) -> tuple[float, float] | None:
    """(Loss/G, Loss/D) of a discriminator whose logits are all 0; None where it is not known.

    A loss is a mean over logits, summed over B feature networks (training/losses.py). The
    non-saturating one has softplus(0) = ln 2 per term, the hinge loss -0 for G and 1 per term for
    D; G has one term, D two.
    """
    match config.get("discriminator"):
        case {"kind": DiscriminatorKind.diffusion.value}:
            # Its heads, that on the pixels too, answer as one network.
            branches = Discriminator.branches
        case {"kind": DiscriminatorKind.projected.value, "backbones": [_, *_] as backbones}:
            branches = len(backbones)
        case _:
            return None
    match config.get("loss"):
        case {"kind": LossKind.hinge.value}:
            return 0.0, 2.0 * branches
        case {"kind": LossKind.nonsaturating.value}:
            return branches * math.log(2), 2 * branches * math.log(2)
    return None


def charts(config: dict[str, Any], metrics: Sequence[str]) -> list[Chart]:
    """All panels of a page, fine-tuning's and pre-training's; those without data are left out."""
    measured = [
        Chart(
            metric.removeprefix(METRIC),
            (metric,),
            "Lower is better: it falls, then levels off. One that rises again for several "
            "snapshots says that the best checkpoint is behind.",
        )
        for metric in metrics
    ]
    says = "Loss/D going to its lowest while Loss/G climbs says that D wins and G learns little."
    lines: tuple[tuple[float, str], ...] = ()
    if (calm := undecided(config)) is not None:
        lines = (calm[0], "G undecided"), (calm[1], "D undecided")
        says = (
            f"An undecided discriminator gives Loss/G {calm[0]:.2f} and Loss/D {calm[1]:.2f} "
            f"(dotted): healthy is near that, G somewhat above and D somewhat below. {says}"
        )
    return [*measured, Chart("Losses", ("Loss/G", "Loss/D"), says, lines), *_OTHERS]


_OTHERS = (
    Chart(
        "Mean sign of D's logits",
        ("Loss/sign_real", "Loss/sign_fake"),
        "0 is undecided; real somewhat above and fake somewhat below is healthy. Beyond "
        f"{SURE:g} and {-SURE:g} (dotted) D makes no mistakes that G could learn from, and the log "
        "warns.",
        ((0.0, "undecided"), (SURE, "sure"), (-SURE, "sure")),
    ),
    Chart(
        "Diversity",
        ("Loss/diversity",),
        "How much the fakes of a batch differ, relative to the reals: near 1 is healthy. Below "
        f"{LEAST_DIVERSITY:g} (dotted) G may be collapsing, and the log warns.",
        ((1.0, "as reals"), (LEAST_DIVERSITY, "collapsing")),
    ),
    Chart(
        "R1",
        ("Loss/R1",),
        "The weighted gradient penalty, logarithmic. It has no right value: growing slowly beside "
        "steady losses is healthy, a jump by orders of magnitude is not.",
        log=True,
    ),
    Chart(
        "Denoising loss",
        ("Loss/denoising",),
        "EDM's loss falls fast, then slowly, and is noisy; its level depends on the resolution and "
        "the data. Healthy is falling without jumps.",
    ),
    Chart(
        "Updates left out",
        (SKIPPED,),
        "Updates per tick that were not finite: 0 is healthy. A few at the start are usual with "
        f"fp16; {MAX_SKIPPED} iterations in a row end the run.",
        from_zero=True,
    ),
    Chart(
        "Images per second",
        (SPEED,),
        "Without evaluation and saving: level is healthy. Dips are data that come too slowly, or "
        "other work on the machine.",
        from_zero=True,
    ),
    Chart(
        "MFU",
        (MFU,),
        "Share of the GPUs' peak bfloat16 rate that the iteration's own products take: level is "
        "healthy.",
        from_zero=True,
    ),
    Chart(
        "Peak GPU memory, GiB",
        (MEMORY,),
        "The highest allocation since the start: level after the first ticks is healthy.",
        from_zero=True,
    ),
)


# Okabe and Ito's colours, told apart with any colour vision, on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MOST_POINTS = 1000
# The page's own text colour takes this one's place.
_TEXT = "#010203"
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-4, 6),
    "axes.formatter.useoffset": False,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Curve:
    """One line of a chart and how the legend shows it."""

    label: str
    colour: str
    dashed: bool
    points: Series


def curves(chart: Chart, runs: Sequence[tuple[str, Statistics]]) -> list[Curve]:
    """The lines for which there are finite values: a colour per run, or per key of a single one."""
    found, single = [], len(runs) == 1
    for r, (name, statistics) in enumerate(runs):
        for k, key in enumerate(chart.keys):
            if not statistics.values(key):
                continue
            short = key.partition("/")[2]
            label = short if single else name if len(chart.keys) == 1 else f"{name}: {short}"
            colour = COLOURS[(k if single else r) % len(COLOURS)]
            found.append(Curve(label, colour, k % 2 == 1, statistics.series(key)))
    return found


def thinned(series: Series) -> Series:
    """At most MOST_POINTS points, each the mean of as many neighbours; NaN where all are."""
    points = len(series[0])
    size = -(-points // MOST_POINTS)
    if size <= 1:
        return series
    padded = np.pad(series, ((0, 0), (0, -points % size)), constant_values=math.nan)
    with warnings.catch_warnings(action="ignore"):  # the mean of nothing is NaN
        x, y = np.nanmean(padded.reshape(2, -1, size), axis=2).tolist()
    return x, y


def draw(chart: Chart, lines: Sequence[Curve]) -> str:
    """An <svg> element without ids, namespaces or addresses that others could clash with."""
    plt = import_pyplot("the curves of tools/report.py")
    with plt.rc_context({**_STYLE, "svg.hashsalt": ascii(chart.title)}):
        figure, file = plt.Figure(figsize=(3.9, 2.2), layout="constrained"), io.StringIO()
        _plot(figure.subplots(), chart, lines)
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inline(file.getvalue())


def _plot(axis: Any, chart: Chart, lines: Sequence[Curve]) -> None:
    for curve in lines:
        x, y = thinned(curve.points)
        if chart.log:
            y = [value if value > 0 else math.nan for value in y]
        # A single point, and one between two gaps, has no line to be seen by.
        style, dots = "--" if curve.dashed else "-", "o" if len(x) < 50 else None
        axis.plot(x, y, style, color=curve.colour, linewidth=1.5, marker=dots, markersize=3)
    for value, meaning in chart.lines:
        axis.axhline(value, color=_TEXT, linestyle=":", linewidth=1)
        axis.text(
            1.01, value, meaning, transform=axis.get_yaxis_transform(), va="center", fontsize=7
        )
    highest = max(value for curve in lines for value in curve.points[1] if not math.isnan(value))
    if chart.log and highest > 0:
        axis.set_yscale("log")
    if chart.from_zero:
        top = highest if highest > 0 else 1
        axis.set_ylim(-0.03 * top, 1.05 * top)  # a line of zeros is above the axis
    axis.set_xlabel("thousands of images")
    axis.grid(True, color="#808080", alpha=0.25, linewidth=0.6)


def _inline(svg: str) -> str:
    """The element alone, in the page's colour, scaled by the page, referring only to itself."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?|<style.*?</style>", "", svg, flags=re.DOTALL)
    head, close, rest = svg.partition(">")
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", head) + close + rest
    svg = svg.replace("xlink:href=", "href=").replace(_TEXT, "currentColor")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    return re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
