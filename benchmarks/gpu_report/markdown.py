"""report.json as tables."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import exp, fsum, log
from typing import Any

from benchmarks.gpu_report.results import Content
from benchmarks.gpu_report.variants import BASELINES

DRY_RUN = "**A dry run on a CPU: no number here is a speed.**"
DIRECTIONS = ("forward", "dgrad", "dgrad_flipped")


def markdown(report: Content) -> str:
    """The whole report; sections of parts without a result are absent, and named at its end."""
    sections: dict[str, Callable[[Content], list[str]]] = {
        "environment": _environment,
        "rates": _rates,
        "parity": _parity,
        "kernels": _kernels,
        "steps": _steps,
        "traces": _traces,
        "ablation": _ablation,
        "cifar10": _cifar10,
    }
    lines = ["# GPU report", *([DRY_RUN] if report["dry_run"] else [])]
    for part, section in sections.items():
        if part in report:
            lines += [f"## {part.capitalize()}", *section(report[part])]
    if report["missing"]:
        lines += ["## Missing", *_missing(report["missing"])]
    return "\n\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; None is shown as -."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [["-" if cell is None else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def number(value: float | None, digits: str = ".3g", scale: float = 1.0) -> str | None:
    return None if value is None else f"{value * scale:{digits}}"


def _environment(found: Content) -> list[str]:
    rows: list[tuple[str, object]] = [("device", found["chip"]), ("date", found["datetime"])]
    gpu = found["gpu"] or {}
    if gpu:
        rows += [("memory", f"{gpu['memory_bytes'] / 2**30:.1f} GiB")]
        rows += [(key, gpu[key]) for key in ("capability", "multiprocessors", "l2_bytes")]
    rows += list((found["nvidia_smi"] or {}).items())
    rows += [*found["software"].items(), *found["packages"].items()]
    commit = found["commit"]
    rows += [("commit", commit and commit["id"] + (" (changed)" if commit["changed"] else ""))]
    return [table(("what", "value"), rows)]


def _rates(found: Content) -> list[str]:
    lines = []
    if "chip_rates" in found:
        measured = found["chip_rates"]
        rows = [("copy, TB/s", number(measured["copy"]["median"], ".3f", 1e-12))]
        rates = {name: each for name, each in measured.items() if name != "copy"}
        rows += [
            (f"product {name}, TFLOP/s", number(each["median"], ".1f", 1e-12))
            for name, each in rates.items()
        ]
        lines.append(table(("rate", f"median of {measured['copy']['n']}"), rows))
    if found["by_network"]:
        lines += ["Share of the matrix rate, all 3x3 convolutions of a pass:", _efficiencies(found)]
    for network, rows in found["convolutions"].items():
        lines += [f"{network}, TFLOP/s (share of the matrix rate):", _convolutions(rows)]
    if found["heads"]:
        lines += ["The heads' 4x4 convolutions of stride 2:", _convolutions(found["heads"])]
    return lines


def _efficiencies(found: Content) -> str:
    networks = found["by_network"] | {"all": found}
    names = [f"conv_{d}_efficiency{suffix}" for suffix in ("", "_fp16") for d in DIRECTIONS]
    columns = [f"{d} {kind}" for kind in ("bf16", "fp16") for d in DIRECTIONS]
    rows = [(name, *(number(each.get(n), ".0%") for n in names)) for name, each in networks.items()]
    return table(("network", *columns), rows)


def _convolutions(rows: list[Content]) -> str:
    """A line per shape, a column per direction and arithmetic."""
    shapes: defaultdict[tuple, dict[tuple[str, str], Content]] = defaultdict(dict)
    for row in rows:
        name = (f"{row['cin']} to {row['cout']}, {row['size']} px", row["batch"], row["count"])
        shapes[name][row["direction"], row["arithmetic"]] = row
    columns = list(dict.fromkeys((row["direction"], row["arithmetic"]) for row in rows))
    cells = [
        (*name, *(f"{each[c]['flops'] / 1e12:.1f} ({each[c]['share']:.0%})" for c in columns))
        for name, each in shapes.items()
    ]
    return table(("shape", "batch", "per pass", *map(" ".join, columns)), cells)


def _parity(found: Content) -> list[str]:
    keys = ("passed", "failed", "skipped")
    rows = [(name, *(each[k] for k in keys)) for name, each in found["files"].items()]
    lines = [table(("tests/kernels", *keys), [*rows, ("all", *(found[k] for k in keys))])]
    failures = [each for file in found["files"].values() for each in file["failures"]]
    return lines + [f"- `{each['test']}`: {each['line']}" for each in failures]


def _kernels(found: Content) -> list[str]:
    medians = {_key(row): row["seconds"] for row in found["rows"]}
    groups: defaultdict[tuple[str, ...], list[Content]] = defaultdict(list)
    for row in found["rows"]:
        groups[row["op"], row["network"], row["direction"], row["candidate"]].append(row)
    columns = ("op", "network", "direction", "candidate", "shapes", "share of floor")
    against = ("compile", "eager")
    titles = [f"x {other} ({what})" for other in against for what in ("mean", "lowest")]
    lines = []
    for name, rows in groups.items():
        spent = sum(row["count"] * row["seconds"] for row in rows)
        share = sum(r["count"] * r["seconds"] * r["share_of_floor"] for r in rows) / spent
        ratios = [_against(rows, medians, other) for other in against]
        cells = [number(value, ".2f") for pair in ratios for value in pair]
        lines.append((*name, len(rows), number(share, ".0%"), *cells))
    failed = [" ".join(str(value) for value in case.values()) for case in found["failed"]]
    return [table((*columns, *titles), lines), *(f"- failed: {case}" for case in failed)]


def _key(row: Content, candidate: str | None = None) -> tuple[str, ...]:
    names = ("op", "network", "shape", "direction")
    return (*(row[name] for name in names), candidate or row["candidate"])


def _against(
    rows: list[Content], medians: dict[tuple[str, ...], float], other: str
) -> tuple[float | None, float | None]:
    """Geometric mean and lowest of how many times faster the rows are than `other`."""
    keys = [(_key(row, other), row["seconds"]) for row in rows]
    ratios = [medians[key] / seconds for key, seconds in keys if key in medians]
    if not ratios:
        return None, None
    return exp(fsum(map(log, ratios)) / len(ratios)), min(ratios)


def _steps(found: Content) -> list[str]:
    lines = []
    for experiment, content in found["experiments"].items():
        rate = number(content["matmul_rate"], ".1f", 1e-12)
        within = f" (bfloat16 product {rate} TFLOP/s in the same process)" if rate else ""
        lines += [f"**{experiment}**{within}", _step_table(content)]
        lines += [
            f"- {name} skipped {each['skipped_updates']} updates (not finite): less work than usual"
            for name, each in content["variants"].items()
            if each.get("skipped_updates")
        ]
    return lines


def _step_table(content: Content) -> str:
    columns = ["step", "batch", "img/s", "MFU", "iteration, ms", "R1 adds, ms", "n", "peak, GB"]
    columns += ["first step, s", "first R1, s", "launches", *(f"x {base}" for base in BASELINES)]
    rows = []
    for name, each in content["variants"].items():
        if "img_s" not in each:
            rows.append([name, each["error"] or "no round"] + [None] * (len(columns) - 2))
            continue
        ratios = [content["ratios"].get(base, {}).get(name) for base in BASELINES]
        cells = _step_cells(each, name.startswith("plain"))
        rows.append([name, *cells, *(number(r and r["median"], ".2f") for r in ratios)])
    return table(columns, rows)


def _step_cells(each: Content, plain: bool) -> list[Any]:
    facts, iteration = each["facts"], each["iteration_ms"]
    cached = facts["compiled_before"] and not plain
    return [
        facts["batch"],
        number(each["img_s"], ".1f"),
        number(each["mfu"], ".1%"),
        number(iteration["median"], ".1f"),
        number(each["r1_extra_ms"], ".1f"),
        iteration["n"],
        facts["peak_r1"] and number(facts["peak_r1"]["reserved"], ".1f", 1e-9),
        f"{facts['first_step_seconds']:.1f}" + (" (cached)" if cached else ""),
        number(facts["first_r1_seconds"], ".1f"),
        facts["launches"] and facts["launches"]["launches"],
    ]


def _traces(found: Content) -> list[str]:
    """Milliseconds by kind of the iterations that were profiled, without and with R1."""
    profiles = {
        f"{name} {what}": each
        for name, case in found["cases"].items()
        for what, each in case["profile"]["profiles"].items()
    }
    kinds = list(dict.fromkeys(kind for each in profiles.values() for kind in each["kinds"]))
    rows = []
    for name, each in profiles.items():
        spent = [each["milliseconds"], *(each["kinds"].get(kind) for kind in kinds)]
        rows.append([name, number(each["launches"], ".0f"), *(number(ms, ".1f") for ms in spent)])
    return [table(("profile, ms", "launches", "all", *kinds), rows)]


def _ablation(found: Content) -> list[str]:
    lines = []
    for experiment, content in found["experiments"].items():
        lines += [f"**{experiment}**, every row adds to the row above:"]
        lines += [_ablation_table(content["rows"])]
    return lines


def _ablation_table(rows: Content) -> str:
    columns = ["row", "batch", "img/s", "x row above", "x published", "iteration, ms"]
    columns += ["R1 adds, ms", "MFU", "peak, GB", "img/s again"]
    lines: list[list[object]] = []
    for name, each in rows.items():
        if "img_s" not in each:
            lines.append([name, each["error"] or "no round"] + [None] * (len(columns) - 2))
            continue
        peak = each["facts"]["peak_r1"]
        lines.append(
            [
                name,
                each["facts"]["batch"],
                number(each["img_s"], ".1f"),
                each["gain"] and number(each["gain"]["median"], ".3f"),
                number(each["total"], ".2f"),
                number(each["iteration_ms"]["median"], ".1f"),
                number(each["r1_extra_ms"], ".1f"),
                number(each["mfu"], ".1%"),
                peak and number(peak["reserved"], ".1f", 1e-9),
                number(each["again"], ".1f"),
            ]
        )
    return table(columns, lines)


def _cifar10(found: Content) -> list[str]:
    """Distances by stage and features; the un-tuned teacher as a row of its own."""
    rows: dict[str, Content] = {}
    for stage, each in found["stages"].items():
        rows |= {"untuned": {"scores": each["untuned"]}} if "untuned" in each else {}
        rows[stage] = each
    names = list(dict.fromkeys(name for each in rows.values() for name in each.get("scores", {})))
    lines = []
    for stage, each in rows.items():
        scores = [each.get("scores", {}).get(name) for name in names]
        speed = each.get("img_per_sec")
        distances = (number(score and score["value"], ".3g") for score in scores)
        lines.append([stage, *distances, speed and number(speed["median"], ".0f")])
    columns = ["stage", *(f"FD, {name}" for name in names), "img/s"]
    return ["Distances to the training images, one seed:", table(columns, lines)]


def _missing(missing: dict[str, str | None]) -> list[str]:
    return ["\n".join(f"- {name}: {line or 'not run yet'}" for name, line in missing.items())]
