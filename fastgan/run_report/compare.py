"""Several runs side by side: names, settings that differ, best metrics."""

import json
from collections.abc import Sequence
from typing import Any

from fastgan.errors import shown
from fastgan.run_report.run import Run
from fastgan.run_report.statistics import METRIC, SPEED
from fastgan.run_report.words import number, thousands

MOST_RUNS = 6
ABSENT = "absent"
_MOST_TEXT = 200

Row = tuple[str, list[str]]


def names_of(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as many of the folders around them as tell all of them apart."""
    parts = [run.path.resolve().parts for run in runs]
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
    return f"{number(best[0])} at {thousands(best[1])} thousand images" if best else "-"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{name}.")
        else:
            found[name] = shown(json.dumps(value, default=str), _MOST_TEXT)
    return found
