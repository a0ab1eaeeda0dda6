"""The report: all results of a folder as one object and as markdown, and the numbers that
benchmarks/targets.json asks for, which become the project's record."""

import json
from collections.abc import Iterable
from math import exp, fsum, log
from pathlib import Path
from statistics import median

from benchmarks.cases import DIRECTIONS, REQUIRED, published
from benchmarks.gpu_report.run import Case, Place, write_json
from benchmarks.measure import Content
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically

DRY_RUN = "**A dry run on a CPU: no number here is a speed.**"
# What variants of a step are compared with.
BASELINES = ("plain-published", "compiled-bf16", "fast-bf16")
# The targets are for this GPU; what is measured on another one is not recorded.
MACHINE = "H200"
# Where a norm has to read its input once only; larger maps fit on no multiprocessor.
ONE_PASS_PIXELS = 1024
PRODUCT, BF16 = "matmul_rate_", "matmul_rate_bf16"
NORM, BLOCK = "group_norm_silu", "frozen_unet_block"


def collect(out: Path, cases: Iterable[Case], tiny: bool) -> Content:
    """By part and case what is there; `missing`: the others, with the line in which they failed.
    A case that has not ended is in both, with what it noted."""
    report: Content = {"dry_run": tiny, "missing": {}, "parts": {}}
    for case in cases:
        content = Place(out, case.name, tiny).found()
        if not content.get("complete"):
            report["missing"][case.name] = content.get("error")
        if "table" in content:
            name = case.name.partition("/")[2]
            report["parts"].setdefault(case.part, {})[name] = content
    return report


def markdown(report: Content, targets: Iterable[Content]) -> str:
    """A table per case, the targets that were measured, and what is missing."""
    lines = ["# GPU report", *([DRY_RUN] if report["dry_run"] else [])]
    for part, found in report["parts"].items():
        first = next(iter(found.values()))
        software = [f"{name} {version}" for name, version in first["software"].items()]
        lines += [
            f"## {part.capitalize()}",
            ", ".join([first["chip"], first["datetime"], *software]),
        ]
        for name, content in found.items():
            lines += [f"**{name}**", table(content["table"])]
            lines += [f"- failed: {line}" for line in content.get("failed", ())]
    measured = {name: value for found in numbers(report).values() for name, value in found.items()}
    rows = [
        {"target": t["metric"], "wanted": t["target"], "measured": measured[t["id"]]}
        for t in targets
        if t["id"] in measured and not report["dry_run"]
    ]
    lines += ["## Targets", table(rows)] if rows else []
    missing = [f"- {name}: {line or 'not run yet'}" for name, line in report["missing"].items()]
    lines += ["## Missing", "\n".join(missing)] if missing else []
    return "\n\n".join(lines) + "\n"


def table(rows: list[Content]) -> str:
    """Rows as a markdown table, with a column for every key; what has no value is shown as -."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_shown(row.get(key)) for key in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= value < 1e7 else f"{value:.4g}"
    return "-" if value is None else str(value)


def described(content: Content) -> Content:
    """The content with its `table`: per variant medians of all its rounds, and what it is of every
    baseline's images per second, round by round. Without a matrix rate (a dry run) no MFU."""
    rows = []
    for name, noted in content["variants"].items():
        row: Content = {"variant": name}
        mine = [found for found in content["rounds"] if name in found]
        if mine:
            facts, rate = noted["facts"], content["matmul_rate"]
            iterations = [taken for found in mine for taken in found[name]["iterations"]]
            iteration, r1 = median(iterations), median(found[name]["r1"] for found in mine)
            speed = img_s(facts, iteration, r1)
            row |= {"batch": facts["batch"], "img_s": speed}
            row |= {"mfu": rate and facts["flop_per_image"] * speed / rate}
            row |= {"iteration_ms": 1e3 * iteration, "n": len(iterations)}
            row |= {"r1_adds_ms": 1e3 * (r1 - iteration)}
            row |= {"peak_gb": facts["peak_bytes"] and facts["peak_bytes"] / 1e9}
            row |= {"first_step_s": facts["first_step_seconds"]}
            row |= {f"vs_{base}": faster(content, name, base) for base in BASELINES}
            row |= {"kept_vs_compiled-bf16": _kept(content, name, "compiled-bf16")}
            row |= {"skipped_updates": noted["skipped_updates"] or None}
        rows.append(row | {"error": noted["error"]})
    return content | {"table": rows}


def img_s(facts: Content, iteration: float, r1: float) -> float:
    """On the published schedule: every so many iterations one with R1, which takes `r1` seconds."""
    return facts["batch"] / (iteration + (r1 - iteration) / facts["interval"])


def faster(content: Content, name: str, base: str) -> float | None:
    """Images per second over those of `base` in the same round, which may have had another batch;
    the median of the rounds that had both."""
    speeds = [
        {
            each: img_s(content["variants"][each]["facts"], median(t["iterations"]), t["r1"])
            for each, t in found.items()
        }
        for found in content["rounds"]
    ]
    both = [speed[name] / speed[base] for speed in speeds if {name, base} <= speed.keys()]
    return median(both) if both else None


def _kept(content: Content, name: str, base: str) -> float | None:
    """Bytes that G keeps for its backward, over those of `base`."""
    facts = [content["variants"].get(each, {}).get("facts") or {} for each in (name, base)]
    mine, theirs = (each.get("generator_kept") for each in facts)
    return mine / theirs if mine and theirs else None


def gains(content: Content) -> Content:
    """The ablation with a `table` of its rows: `vs_above`, over the nearest row above that took
    turns with it, and `total`, over `published`: the product of those."""
    above: Content = {}
    for row in content["table"]:
        for key in [key for key in row if "vs_" in key]:
            del row[key]
        if "img_s" in row:
            gain = faster(content, row["variant"], above["variant"]) if above else None
            total = above["total"] * gain if gain and above["total"] else None
            total = 1.0 if row["variant"] == "published" else total
            row |= {"vs_above": gain, "total": total}
            above = row
    return content


def pooled(rows: Iterable[Content]) -> float:
    """Share of the floor over all ops of a pass together, each as often as it occurs."""
    rows = list(rows)
    spent = sum(row["count"] * row["seconds"]["median"] for row in rows)
    return sum(row["count"] * row["floor_seconds"] for row in rows) / spent


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [log(value) for value in values]
    return exp(fsum(logarithms) / len(logarithms))


def ratios(rows: Iterable[Content], mine: str, other: str) -> list[float]:
    """How many times faster `mine` is than `other`, of every shape and direction of both."""
    found = {(*_key(row), row["candidate"]): row["seconds"]["median"] for row in rows}
    keys = [key[:-1] for key in found if key[-1] == mine and (*key[:-1], other) in found]
    return [found[*key, other] / found[*key, mine] for key in keys]


def _key(row: Content) -> tuple[str, ...]:
    """What is the same for all candidates."""
    return row["op"], row["network"], row["shape"], row["direction"]


def speeds(rows: Iterable[Content], candidate: str, direction: str) -> Content:
    """A candidate's line of a table: shapes, share of the floor, and how many times faster it is
    than torch.compile and the library (geometric mean, lowest)."""
    here = [row for row in rows if row["direction"] == direction]
    mine = [row for row in here if row["candidate"] == candidate]
    line: Content = {"shapes": len(mine), "share of floor": pooled(mine) if mine else None}
    for other in ("compile", "library"):
        found = ratios(here, candidate, other)
        line |= {f"x {other}": geometric_mean(found) if found else None}
        line |= {f"x {other}, lowest": min(found, default=None)}
    return line


def both_ways(rows: Iterable[Content]) -> list[Content]:
    """Forward and backward as one row."""
    summed: dict[tuple[str, ...], Content] = {}
    for row in rows:
        name = (*_key(row)[:3], row["candidate"])
        before = summed[name]["seconds"]["median"] if name in summed else 0
        seconds = {"median": before + row["seconds"]["median"]}
        summed[name] = row | {"direction": "both", "seconds": seconds}
    return list(summed.values())


def numbers(report: Content) -> dict[str, dict[str, float]]:
    """Per part its measured numbers by the `id` that a row of benchmarks/targets.json would have.

    rates: copy_bandwidth, matmul_rate_ARITHMETIC, conv_DIRECTION_efficiency. kernels: OP_QUANTITY,
    of ops that are complete. steps: EXPERIMENT_VARIANT_COLUMN of the tables, with _ for -.
    """
    parts = report["parts"]
    rates = {row["rate"]: row["median"] for row in _table(parts, "rates", "chip")}
    rates |= {"matmul_rate": rates[BF16]} if BF16 in rates else {}
    shares = _table(parts, "rates", "convolutions")
    for name in ("forward", "dgrad", "dgrad_flipped") if shares else ():
        spent = sum(row["flop"] / row[name] for row in shares)
        rates[f"conv_{name}_efficiency"] = sum(row["flop"] for row in shares) / spent
    steps = {
        f"{experiment}_{row['variant']}_{name}".replace("-", "_"): value
        for experiment, content in parts.get("steps", {}).items()
        for row in content["table"]
        for name, value in row.items()
        if isinstance(value, float)
    }
    rows = [row for content in parts.get("kernels", {}).values() for row in content.get("rows", ())]
    return {"rates": rates, "kernels": kernel_numbers(rows), "steps": steps}


def _table(parts: Content, part: str, case: str) -> list[Content]:
    return parts.get(part, {}).get(case, {}).get("table", [])


def kernel_numbers(rows: list[Content]) -> dict[str, float]:
    """Of NORM and BLOCK, each where every required candidate was measured at every shape."""
    found: dict[str, float] = {}
    for op, function in {NORM: _norm_numbers, BLOCK: _block_numbers}.items():
        wanted = {
            (op, case.network.name, str(case.shape), direction, candidate)
            for case in published(op)
            for direction in DIRECTIONS
            for candidate in REQUIRED
        }
        mine = [row for row in rows if row["op"] == op]
        if wanted <= {(*_key(row), row["candidate"]) for row in mine}:
            found |= {f"{op}_{name}": value for name, value in function(mine).items()}
    return found


def _norm_numbers(rows: list[Content]) -> dict[str, float]:
    ours = [row for row in rows if row["candidate"] == "ours"]
    one_pass = [row for row in rows if row["pixels"] <= ONE_PASS_PIXELS]
    adm = [row for row in ours if row["network"] == "ImageNet-64"]
    # Channels that apex refuses, against the others: in bytes per second.
    apexless = [row for row in adm if row["channels"] in (192, 576, 1152)]

    def lowest(direction: str) -> float:
        mine = [row for row in ours if row["direction"] == direction]
        names = {row["network"] for row in mine}
        return min(pooled(row for row in mine if row["network"] == name) for name in names)

    return {
        "forward_bandwidth": lowest("forward"),
        "backward_bandwidth": lowest("backward"),
        "one_pass_vs_compile": geometric_mean(ratios(one_pass, "ours", "compile")),
        "one_pass_vs_eager": geometric_mean(ratios(one_pass, "ours", "library")),
        "elsewhere_vs_compile": min(
            ratios((row for row in rows if row not in one_pass), "ours", "compile")
        ),
        "apexless_channels": pooled(apexless) / pooled(row for row in adm if row not in apexless),
    }


def _block_numbers(rows: list[Content]) -> dict[str, float]:
    both = both_ways(rows)
    narrow = [row for row in both if row["channels"] <= 256]
    kept = {(*_key(row), row["candidate"]): row["kept_bytes"] for row in rows}
    shares = [
        size / kept[*key[:-1], "compile"]
        for key, size in kept.items()
        if key[-1] == "ours" and size
    ]
    return {
        "narrow_vs_compile": geometric_mean(ratios(narrow, "ours", "compile")),
        "vs_compile": min(ratios(both, "ours", "compile")),
        **({"kept_memory": max(shares)} if shares else {}),
    }


def record(report: Content, root: Path) -> str:
    """Writes benchmarks/results/h200-DATE/ below `root` and the rows of targets.json that were
    measured; returns the folder's name. UserError, and nothing is written, where not all was
    measured on one GPU for which the targets are."""
    contents = [each for found in report["parts"].values() for each in found.values()]
    chips = sorted({each["chip"] for each in contents}) or ["nothing"]
    if report["dry_run"] or len(chips) > 1 or MACHINE not in chips[0]:
        raise UserError(
            f"measured on {', '.join(chips)}, --update, all of it on one {MACHINE}, for which the "
            "targets are, would do"
        )
    date = max(each["datetime"] for each in contents)[:10]
    folder = f"benchmarks/results/{MACHINE.lower()}-{date}"
    targets, measured = read_targets(root), numbers(report)
    for part, cases in report["parts"].items():
        found = measured.get(part, {})
        held = {t["id"]: found[t["id"]] for t in targets if t["id"] in found}
        about: Content = {"chip": chips[0], "date": date, "dry_run": False, "targets": held}
        if part == "rates":
            # By the names that tools/budget.py reads.
            products = {
                k.removeprefix(PRODUCT): v for k, v in found.items() if k.startswith(PRODUCT)
            }
            about |= found | {"matmul_rates": products}
        write_json(root / folder / f"{part}.json", about | {"cases": cases})
        for target in targets:
            if target["id"] in held:
                target |= {"value": held[target["id"]], "machine": chips[0], "date": date}
                target |= {"status": "measured" if is_met(target) else "missed"}
                target |= {"result_file": f"{folder}/{part}.json"}
    write_json(root / "benchmarks/targets.json", targets)
    write_report(report, root / folder, targets)
    return folder


def is_met(target: Content) -> bool:
    """Whether its value is what was wanted; every metric ends with `at least` or `at most`."""
    value, wanted = target["value"], target["target"]
    return value >= wanted if target["metric"].endswith("at least") else value <= wanted


def read_targets(root: Path) -> list[Content]:
    return json.loads((root / "benchmarks/targets.json").read_text())


def write_report(report: Content, folder: Path, targets: Iterable[Content]) -> None:
    with replace_atomically(folder / "report.md") as file:
        file.write(markdown(report, targets).encode())
