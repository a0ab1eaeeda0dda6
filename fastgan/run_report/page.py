"""The page: what of a run goes where, and the file it is written to."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fastgan.common.errors import UserError, shown
from fastgan.common.files import replace_atomically
from fastgan.evaluation.protocol import versions
from fastgan.run_report.curves import charts, curves, draw
from fastgan.run_report.run import Run, read_run, samples
from fastgan.run_report.statistics import MEMORY, METRIC, MFU, SPEED

NAME = "report.html"
MOST_RUNS = 6
ABSENT = "absent"
_MOST_TEXT = 200

Row = tuple[str, list[str]]


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
    template = files("fastgan.run_report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    run, names = runs[0], names_of(runs)
    grids = [  # first: what is read may leave notes
        {
            "uri": uri,
            "kimg": f"{nimg / 1000:,.1f}",
            "metrics": _metric_words(run.statistics.measured_at(nimg)),
        }
        for nimg, uri in samples(run.folder)
    ]
    notes = [
        note if len(runs) == 1 else f"{name}: {note}"
        for name, each in zip(names, runs, strict=True)
        for note in each.folder.notes
    ]
    return environment.from_string(template).render(
        samples=grids,
        charts=list(_charts(runs, names)),
        run=run,
        name=names[0],
        names=names,
        facts=list(_facts(run)),
        checkpoints=_checkpoints(run),
        config_text="".join(c if c.isprintable() or c == "\n" else "?" for c in run.config_text),
        comparison=side_by_side(runs) if len(runs) > 1 else [],
        differing=differing_settings([each.config for each in runs]),
        notes=notes,
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
        took = timedelta(seconds=round(last - first))
        yield "Wall time", f"{took} from the first tick to the last ({range_})"
    running, speed = run.state and run.state.status == "running", statistics.median(SPEED) or 0
    if running and total is not None and speed > 0:
        left = max(total - run.nimg, 0) / speed
        if left < 1e12:
            yield "Left", f"about {timedelta(seconds=round(left))} at the median speed"


def _charts(runs: Sequence[Run], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    metrics = list(dict.fromkeys(key for run in runs for key in run.statistics.metrics))
    named = [(name, run.statistics) for name, run in zip(names, runs, strict=True)]
    for chart in charts(runs[0].config, metrics):
        lines, single = curves(chart, named), len(chart.keys) == 1
        if lines:
            yield {
                "title": shown(chart.title),
                "says": chart.says,
                "svg": Markup(draw(chart, lines)),
                "legend": lines if max(len(lines), len(runs)) > 1 else [],
                "last": ", ".join(
                    number(values[-1])
                    if single
                    else f"{key.partition('/')[2]} = {number(values[-1])}"
                    for key in chart.keys
                    if (values := runs[0].statistics.values(key))
                ),
            }


def _checkpoints(run: Run) -> list[dict[str, Any]]:
    # Training keeps the best by its lowest number.
    scores = [min(c.metrics.values(), default=math.inf) for c in run.checkpoints]
    lowest = min(scores, default=math.inf)
    return [
        {
            "kimg": f"{c.nimg / 1000:,.1f}",
            "metrics": _metric_words(c.metrics),
            "sha256": c.sha256,
            "best": bool(c.metrics) and score == lowest,
        }
        for c, score in zip(run.checkpoints, scores, strict=True)
    ]


def _metric_words(metrics: dict[str, float]) -> str:
    named = list(metrics.items())[:MOST_RUNS]
    return ", ".join(f"{shown(key.removeprefix(METRIC))} = {number(v)}" for key, v in named)


def names_of(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as many of the folders around them as tell all of them apart."""
    parts = [run.folder.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return [shown(name) for name in names]


def differing_settings(configs: Sequence[dict[str, Any]]) -> list[Row]:
    """Dotted keys whose values are not the same in all configurations, except run_dir."""
    flat = [_flat(config) for config in configs]
    keys = sorted({key for settings in flat for key in settings} - {"run_dir"})
    rows = [(shown(key), [settings.get(key, ABSENT) for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def side_by_side(runs: Sequence[Run]) -> list[Row]:
    """How each run stands, in rows: state, images, best of every metric, speed."""
    metrics = list(dict.fromkeys(key for run in runs for key in run.statistics.metrics))
    rows = [
        ("state", [run.state.status if run.state else "not known" for run in runs]),
        ("images", [f"{run.nimg:,}" for run in runs]),
    ]
    rows += [
        (f"best {shown(key.removeprefix(METRIC))}", [best_words(run, key) for run in runs])
        for key in metrics
    ]
    speeds = [number(run.statistics.median(SPEED)) for run in runs]
    return [*rows, ("median img/s", speeds)]


def best_words(run: Run, metric: str) -> str:
    """`1.54 at 40.0 thousand images`."""
    best = run.statistics.best(metric)
    return f"{number(best[0])} at {best[1]:,.1f} thousand images" if best else "-"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{name}.")
        else:
            found[name] = shown(json.dumps(value, default=str), _MOST_TEXT)
    return found


def number(value: float | None) -> str:
    """Four digits; whole above a thousand; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def moment(timestamp: float) -> str:
    """Seconds since 1970 (before the year 10000) as 2026-01-31 12:00 UTC."""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M UTC")
