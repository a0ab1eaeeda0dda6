"""The report: tables of all results of a folder, and the targets that they meet or miss.

A `table` is an object of rows by name, each an object of columns by name, so that a target is a
file and a path in it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from functools import reduce
from operator import getitem
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from benchmarks.cases import DIRECTIONS
from benchmarks.gpu_report.run import Case, Place, write_json
from benchmarks.measure import Content
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically

DRY_RUN = "**A dry run on a CPU: no number here is a speed.**"
# What variants of a step are compared with.
BASELINES = ("plain-published", "compiled-bf16", "fast-bf16")
# The targets are for this GPU; what is measured on another one is not recorded.
MACHINE = "H200"
# Shapes by what decides how an op works on them: one read of the input suffices for maps of up to
# 1024 pixels; apex has no kernel for some channels.
GROUPS: dict[str, Callable[[Content], bool]] = {
    "all": lambda row: True,
    "up to 32px": lambda row: row["pixels"] <= 1024,
    "64px": lambda row: row["pixels"] > 1024,
    "up to 256 channels": lambda row: row["channels"] <= 256,
    "192, 576, 1152 channels": lambda row: row["channels"] in (192, 576, 1152),
}


def collect(out: Path, cases: Iterable[Case], tiny: bool) -> dict[str, Content]:
    """What is there by case, {} where nothing is."""
    return {case.name: Place(out, case.name, tiny).found() for case in cases}


def write_report(
    results: Mapping[str, Content], folder: Path, targets: Iterable[Content], tiny: bool = False
) -> None:
    """`report.md`: a table per case, the targets that were measured, and what is missing: with the
    line in which it failed, and with what it noted until then."""
    lines = ["# GPU report", *([DRY_RUN] if tiny else [])]
    for name, content in results.items():
        if "table" in content:
            software = [f"{key} {version}" for key, version in content["software"].items()]
            lines += [f"## {name}", ", ".join([content["chip"], content["datetime"], *software])]
            lines.append(table(content["table"]))
            lines += [f"- failed: {line}" for line in content.get("failed", ())]
    values = {target["metric"]: (target["target"], value_of(target, results)) for target in targets}
    rows = {k: {"wanted": t, "measured": v} for k, (t, v) in values.items() if v is not None}
    lines += ["## Targets", table(rows)] if rows and not tiny else []
    missing = {k: c.get("error") for k, c in results.items() if not c.get("complete")}
    listed = "\n".join(f"- {name}: {line or 'not run yet'}" for name, line in missing.items())
    lines += ["## Missing", listed] if missing else []
    with replace_atomically(folder / "report.md") as file:
        file.write(("\n\n".join(lines) + "\n").encode())


def table(rows: Mapping[str, Content]) -> str:
    """Rows as a markdown table, with a column for every key; what has no value is shown as -."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [[name, *(_shown(row.get(key)) for key in columns)] for name, row in rows.items()]
    lines = [["", *columns], ["---"] * (len(columns) + 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= value < 1e7 else f"{value:.4g}"
    return "-" if value is None else str(value)


def described(content: Content) -> Content:
    """Steps with their `table`: per variant medians of all its rounds; its images per second over
    every baseline's, over the nearest variant's above that took turns with it, and over the first
    one's: the product of those. Without a matrix rate (a dry run) no MFU."""
    rows: Content = {}
    above: str | None = None
    total: float | None = None
    for name, noted in content["variants"].items():
        turns = [found[name] for found in content["rounds"] if name in found]
        rows[name] = {"error": noted["error"]}
        if not turns:
            continue
        facts, rate = noted["facts"], content["matmul_rate"]
        iteration, r1 = (median(turn[key] for turn in turns) for key in ("iteration", "r1"))
        speed = img_s(facts, {"iteration": iteration, "r1": r1})
        gain = faster(content, name, above) if above else None
        # Of the first one only: what failed has no successors that could be compared with it.
        total = gain and total and gain * total if above else (1.0 if len(rows) == 1 else None)
        row = {
            "batch": facts["batch"],
            "img_s": speed,
            "mfu": rate and facts["flop_per_image"] * speed / rate,
            "iteration_ms": 1e3 * iteration,
            "n": len(turns),
            "r1_adds_ms": 1e3 * (r1 - iteration),
            "peak_gb": facts["peak_bytes"] and facts["peak_bytes"] / 1e9,
            "first_step_s": facts["first_step_seconds"],
            **{f"vs_{base}": faster(content, name, base) for base in BASELINES},
            "kept_vs_compiled-bf16": _kept(content, name, "compiled-bf16"),
            "vs_above": gain,
            "total": total,
        }
        rows[name] |= {key: value for key, value in row.items() if value is not None}
        above = name
    return content | {"table": rows}


def img_s(facts: Content, turn: Content) -> float:
    """On the published schedule: every so many iterations one with R1."""
    extra = (turn["r1"] - turn["iteration"]) / facts["interval"]
    return facts["batch"] / (turn["iteration"] + extra)


def faster(content: Content, name: str, base: str) -> float | None:
    """Images per second over those of `base` in the same round, which may have had another batch;
    the median of the rounds that had both."""
    facts = {each: noted["facts"] for each, noted in content["variants"].items()}
    both = [
        img_s(facts[name], found[name]) / img_s(facts[base], found[base])
        for found in content["rounds"]
        if {name, base} <= found.keys()
    ]
    return median(both) if both else None


def _kept(content: Content, name: str, base: str) -> float | None:
    """Bytes that G keeps for its backward, over those of `base`."""
    facts = [content["variants"].get(each, {}).get("facts") or {} for each in (name, base)]
    mine, theirs = (each.get("generator_kept") for each in facts)
    return mine / theirs if mine and theirs else None


def kernel_table(rows: list[Content]) -> Content:
    """By group of shapes, direction and candidate: share of the floor of all together, each shape
    as often as a pass has it, and this relative to the other shapes'; how many times faster than
    torch.compile and the library, and bytes kept over torch.compile's."""
    found: Content = {}
    for group, belongs in GROUPS.items():
        for direction in (*DIRECTIONS, "both"):
            sums: dict[str, dict[str, Content]] = {}
            for row in rows:
                if row["direction"] == direction or direction == "both":
                    _add(sums.setdefault(row["candidate"], {}), row)
            for candidate, shapes in sums.items():
                mine = [shape for shape, row in shapes.items() if belongs(row)]
                if mine and (group == "all" or candidate == "ours"):
                    name = f"{group} {direction} {candidate}"
                    found[name] = _compared(sums, candidate, mine)
    return found


def _add(shapes: dict[str, Content], row: Content) -> None:
    """Adds seconds and floor of a direction to those of the same shape."""
    before = shapes.get(row["shape"], {"spent": 0.0, "floor": 0.0})
    spent, floor = row["seconds"]["median"], row["floor_seconds"]
    sums = {"spent": before["spent"] + spent, "floor": before["floor"] + floor}
    shapes[row["shape"]] = row | sums


def _compared(sums: dict[str, dict[str, Content]], candidate: str, mine: list[str]) -> Content:
    shapes = sums[candidate]

    def share(names: Iterable[str]) -> float:
        here = [shapes[name] for name in names]
        spent = sum(row["count"] * row["spent"] for row in here)
        return sum(row["count"] * row["floor"] for row in here) / spent

    others = [name for name in shapes if name not in mine]
    line: Content = {"shapes": len(mine), "share of floor": share(mine)}
    line["x other shapes"] = share(mine) / share(others) if others else None
    for base in ("compile", "library"):
        theirs = sums.get(base, {})
        times = [theirs[n]["spent"] / shapes[n]["spent"] for n in mine if n in theirs]
        line[f"x {base}"] = geometric_mean(times) if times else None
        line[f"x {base}, lowest"] = min(times, default=None)
    compiled = sums.get("compile", {})
    kept = [shapes[n]["kept_bytes"] / compiled[n]["kept_bytes"] for n in mine
            if n in compiled and shapes[n]["kept_bytes"]]  # fmt: skip
    return line | {"kept x compile, highest": max(kept, default=None)}


def value_of(target: Content, results: Mapping[str, Content]) -> float | None:
    """The number at the target's `path` in its `result_file`, whose last two names are a case's
    (* for any network: the worst of them); None where one has not been measured."""
    pattern = "/".join(Path(target["result_file"]).with_suffix("").parts[-2:])
    found = [content for name, content in results.items() if fnmatch(name, pattern)]
    try:
        if not all(each["complete"] and not each.get("failed") for each in found):
            return None
        keys = target["path"].split("/")
        values: list[Any] = [reduce(getitem, keys, each) for each in found]
        return min(values) if target["metric"].endswith("at least") else max(values)
    except (LookupError, TypeError, ValueError):
        return None


def record(results: Mapping[str, Content], root: Path) -> str:
    """Copies the results to benchmarks/results/h200-DATE/ below `root` and writes what was measured
    into targets.json; returns the folder's name. UserError, and nothing is written, where not all
    was measured on one GPU for which the targets are."""
    found = {name: content for name, content in results.items() if content.get("complete")}
    chips = sorted({content["chip"] for content in found.values()}) or ["nothing"]
    if len(chips) > 1 or MACHINE not in chips[0]:
        raise UserError(
            f"measured on {', '.join(chips)}, --update, all of it on one {MACHINE}, for which the "
            "targets are, would do"
        )
    date = max(content["datetime"] for content in found.values())[:10]
    folder = f"benchmarks/results/{MACHINE.lower()}-{date}"
    for name, content in found.items():
        write_json(root / folder / f"{name}.json", content)
    targets = read_targets(root)
    for target in targets:
        value = value_of(target, results)
        if value is not None:
            file = "/".join(Path(target["result_file"]).parts[-2:])
            target |= {"value": value, "machine": chips[0], "date": date}
            target |= {"status": "measured" if is_met(target) else "missed"}
            target |= {"result_file": f"{folder}/{file}"}
    write_json(root / "benchmarks/targets.json", targets)
    write_report(results, root / folder, targets)
    return folder


def is_met(target: Content) -> bool:
    """Whether its value is what was wanted; every metric ends with `at least` or `at most`."""
    value, wanted = target["value"], target["target"]
    return value >= wanted if target["metric"].endswith("at least") else value <= wanted


def read_targets(root: Path) -> list[Content]:
    return json.loads((root / "benchmarks/targets.json").read_text())
