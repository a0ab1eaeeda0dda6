"""The page: what of a run goes where, and the file it is written to."""

import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fastgan.errors import UserError, shown
from fastgan.evaluation.protocol import versions
from fastgan.files import replace_atomically
from fastgan.run_report.compare import (
    MOST_RUNS,
    best_words,
    differing_settings,
    names_of,
    side_by_side,
)
from fastgan.run_report.curves import curves, draw
from fastgan.run_report.healthy import charts, undecided
from fastgan.run_report.run import Run, read_run, sample_numbers, sample_uri
from fastgan.run_report.statistics import MEMORY, METRIC, MFU, SPEED, Statistics
from fastgan.run_report.words import duration, moment, number, thousands

NAME = "report.html"
_TEMPLATE = "page.html.j2"


def write_report(
    run_dir: Path, *, against: Sequence[Path] = (), out: Path | None = None, command: str = ""
) -> Path:
    """Writes the page about a run, beside the runs `against`, and returns where it is.

    `out` is run_dir/report.html unless given; nothing else in a run changes. `command` is what the
    page says it was made by. UserError: no such run, one that cannot be read, more than MOST_RUNS,
    matplotlib is absent, `out` is no name of a page or cannot be written.
    """
    if len(against) >= MOST_RUNS:
        raise UserError(f"{len(against)} runs, in --against, at most {MOST_RUNS - 1} would be")
    out = run_dir / NAME if out is None else out
    if out.suffix != ".html":  # so that nothing of a run is overwritten
        raise UserError(f"no name of a page, --out {out}, a name that ends with .html would be")
    text = render([read_run(path) for path in (run_dir, *against)], command)
    with replace_atomically(out) as file:
        file.write(text.encode())
    return out


def render(runs: Sequence[Run], command: str) -> str:
    """The HTML of the first run beside the others."""
    template = files("fastgan.run_report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    run, names = runs[0], names_of(runs)
    # What these read may leave notes, which the page shows.
    content = {"samples": _samples(run), "charts": list(_charts(runs, names))}
    return environment.from_string(template).render(
        **content,
        run=run,
        name=names[0],
        names=names,
        facts=list(_facts(run)),
        checkpoints=_checkpoints(run),
        config_text=_printable(run.config_text),
        comparison=side_by_side(runs) if len(runs) > 1 else [],
        differing=differing_settings([each.config for each in runs]),
        cautions=list(_cautions(runs, names)),
        notes=_notes(runs, names),
        versions=versions(),
        made=moment(time.time()),
        command=shown(command, 500),
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """The head's rows."""
    statistics, total = run.statistics, run.total_images
    yield "Images", f"{run.nimg:,}" + (f" of {total:,}" if total else "")
    for metric in statistics.metrics:
        yield f"Best {shown(metric.removeprefix(METRIC))}", best_words(run, metric)
    if speeds := statistics.values(SPEED):
        range_ = f"{number(min(speeds))} to {number(max(speeds))} over {len(speeds):,} ticks"
        yield "Speed", f"median {number(statistics.median(SPEED))} img/s ({range_})"
    if (mfu := statistics.median(MFU)) is not None:
        yield "MFU", f"median {100 * mfu:.1f}%"
    if memory := statistics.values(MEMORY):
        yield "Peak GPU memory", f"{number(max(memory))} GiB"
    if times := statistics.times:
        first, last = min(times), max(times)
        range_ = f"{moment(first)} to {moment(last)}"
        yield "Wall time", f"{duration(last - first)} from the first tick to the last ({range_})"
    if (left := _seconds_left(run)) is not None:
        yield "Left", f"about {duration(left)} at the median speed"


def _seconds_left(run: Run) -> float | None:
    """Of a running run; None where it is not known."""
    if run.state is None or run.state.status != "running" or run.total_images is None:
        return None
    speed = run.statistics.median(SPEED)
    seconds = max(run.total_images - run.nimg, 0) / speed if speed and speed > 0 else None
    return seconds if seconds is not None and seconds < 1e15 else None


def _samples(run: Run) -> list[dict[str, Any]]:
    """Grids with what was measured on them."""
    found = []
    for nimg in sample_numbers(run.folder):
        if uri := sample_uri(run.folder, nimg):
            metrics = _metric_words(run.statistics.measured_at(nimg))
            found.append({"uri": uri, "kimg": thousands(nimg / 1000), "metrics": metrics})
    return found


def _charts(runs: Sequence[Run], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    metrics = list(dict.fromkeys(key for run in runs for key in run.statistics.metrics))
    named = [(name, run.statistics) for name, run in zip(names, runs, strict=True)]
    for chart in charts(runs[0].config, metrics):
        lines = curves(chart, named)
        if lines:
            yield {
                "title": shown(chart.title),
                "says": chart.says,
                "svg": Markup(draw(chart, lines)),
                "legend": lines if max(len(lines), len(runs)) > 1 else [],
                "last": _last(runs[0].statistics, chart.keys),
            }


def _last(statistics: Statistics, keys: Sequence[str]) -> str:
    """The last finite value of every key that has one."""
    last = {key: values[-1] for key in keys if (values := statistics.values(key))}
    if len(keys) == 1:
        return "".join(map(number, last.values()))
    return ", ".join(f"{key.partition('/')[2]} = {number(value)}" for key, value in last.items())


def _checkpoints(run: Run) -> list[dict[str, Any]]:
    lowest = min((c.score for c in run.checkpoints if c.metrics), default=None)
    return [
        {
            "kimg": thousands(c.nimg / 1000),
            "metrics": _metric_words(c.metrics),
            "sha256": c.sha256,
            "best": bool(c.metrics) and c.score == lowest,
        }
        for c in run.checkpoints
    ]


def _metric_words(metrics: dict[str, float]) -> str:
    named = list(metrics.items())[:MOST_RUNS]
    return ", ".join(f"{shown(key.removeprefix(METRIC))} = {number(v)}" for key, v in named)


def _cautions(runs: Sequence[Run], names: Sequence[str]) -> Iterator[str]:
    """What keeps the first run from being compared with another one."""
    first = runs[0]
    for name, run in zip(names[1:], runs[1:], strict=True):
        if run.pretraining != first.pretraining:
            yield f"{name} is another kind of training: only what both record is drawn together."
        elif undecided(run.config) != undecided(first.config):
            yield (
                f"{name} sums its loss otherwise (loss.kind, or the number of feature networks): "
                f"the dotted lines of the losses are those of {names[0]}."
            )


def _notes(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    if len(runs) == 1:
        return runs[0].folder.notes
    pairs = zip(names, runs, strict=True)
    return [f"{name}: {note}" for name, run in pairs for note in run.folder.notes]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
