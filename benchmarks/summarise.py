"""Prints what a benchmark run found; with --update it becomes the project's record.

The table has a line per case; below it stands every target whose op was measured completely. With
--update the rows of benchmarks/targets.json, the results under benchmarks/results/ and the table in
benchmarks/README.md are rewritten. Results of a CPU, of another GPU than the targets are for, with
failed or absent cases are refused.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.results import Results, load, table
from benchmarks.targets import METRICS, missing
from fastgan.common.errors import ArgumentParser, UserError, run_command
from fastgan.common.files import replace_atomically

ROOT = Path(__file__).resolve().parent.parent
# The targets are for this GPU; what is measured on another one is printed, not recorded.
TARGET_MACHINE = "H200"
NOTHING_YET = "Open: nothing was measured on a GPU yet."
BEGIN, END = "<!-- targets: begin -->", "<!-- targets: end -->"


def main() -> int:
    parser = ArgumentParser(prog="python -m benchmarks.summarise", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.json", help="of --benchmark-json")
    parser.add_argument("--update", action="store_true", help="record the results")
    options = parser.parse_args()
    results = load(options.files)
    if options.update:
        changed = update(results, ROOT)
        print(table(results.rows), target_table(changed), sep="\n\n")
        return 0
    print(table(results.rows))
    found = values(results)
    for target in read_targets(ROOT) if results.on_gpu else []:
        if target["id"] in found:
            value = found[target["id"]]
            print(f"{target['id']}: {value:.3g} ({wanted(target)} {target['unit']} wanted)")
    if not results.on_gpu:
        print("CPU: these are no speeds")
    return 0


def values(results: Results) -> dict[str, float]:
    """The numbers of all targets that these results cover."""
    complete = {op for op in _ops(results) if missing(results, op) is None}
    return {
        name: metric.value(results.of(metric.op).rows)
        for name, metric in METRICS.items()
        if metric.op in complete
    }


def update(results: Results, root: Path) -> list[dict[str, Any]]:
    """Records the results below `root`; returns all targets. UserError, and nothing is written,
    where they are no measurement of the targets."""
    if not results.on_gpu:
        raise UserError("measured on a CPU, these results, a run on a GPU would do")
    if TARGET_MACHINE not in results.machine:
        raise UserError(
            f"measured on {results.machine}, these results, one on an {TARGET_MACHINE}, "
            "for which the targets are, would do (without --update they are printed)"
        )
    if results.document["launch"] != "graph":
        raise UserError(
            "Python's launches were measured too, these results, --launch graph would do"
        )
    ops = sorted(_ops(results) & {metric.op for metric in METRICS.values()})
    for problem in filter(None, (missing(results, op) for op in ops)):
        raise UserError(f"{problem}, these results, a complete run without failures would do")
    folder = f"benchmarks/results/{TARGET_MACHINE.lower()}-{results.date}"
    found = values(results)
    for op in sorted(_ops(results)):
        mine = {name: found[name] for name in found if METRICS[name].op == op}
        _write_op(root / folder, op, results.of(op), mine)
    targets = read_targets(root)
    for target in targets:
        if target["id"] in found:
            name = f"{folder}/{METRICS[target['id']].op}.json"
            target |= verdict(target, found[target["id"]], results)
            target["result_file"] = name
    _write_json(root / "benchmarks/targets.json", targets)
    write_readme(root / "benchmarks/README.md", targets)
    return targets


def verdict(target: dict[str, Any], value: float, results: Results) -> dict[str, Any]:
    """What a measurement says about a target."""
    met = value >= target["target"] if at_least(target) else value <= target["target"]
    return {
        "status": "measured" if met else "missed",
        "value": value,
        "machine": results.machine,
        "date": results.date,
    }


def at_least(target: dict[str, Any]) -> bool:
    """Whether larger is better; every metric ends with one of `at least`, `at most`."""
    return target["metric"].endswith("at least")


def wanted(target: dict[str, Any]) -> str:
    return f"{'>=' if at_least(target) else '<='} {target['target']}"


def read_targets(root: Path) -> list[dict[str, Any]]:
    return json.loads((root / "benchmarks/targets.json").read_text())


def target_table(targets: list[dict[str, Any]]) -> str:
    """The targets in markdown; what is open has no value."""
    lines = ["| target | wanted | value | status | machine, date |", "|---|---|---|---|---|"]
    for target in targets:
        metric, value, where = target["metric"].rpartition(",")[0], "", ""
        if target["value"] is not None:
            value, where = f"{target['value']:.3g}", f"{target['machine']}, {target['date']}"
        goal = f"{wanted(target)} {target['unit']}"
        lines.append(f"| {metric} | {goal} | {value} | {target['status']} | {where} |")
    return "\n".join(lines)


def _ops(results: Results) -> set[str]:
    return {row.op for row in results.rows} | {case["op"] for case in results.failed}


def _write_op(folder: Path, op: str, results: Results, found: dict[str, float]) -> None:
    _write_json(folder / f"{op}.json", results.document | {"targets": found})
    software = ", ".join(f"{k} {v}" for k, v in results.document["software"].items())
    text = f"# {op}, {results.machine}, {results.date}\n\n{software}\n\n{table(results.rows)}\n"
    with replace_atomically(folder / f"{op}.md") as file:
        file.write(text.encode())


def _write_json(path: Path, content: object) -> None:
    with replace_atomically(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def write_readme(path: Path, targets: list[dict[str, Any]]) -> None:
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    note = "" if any(t["value"] is not None for t in targets) else f"{NOTHING_YET}\n\n"
    text = f"{before}{BEGIN}\n{note}{target_table(targets)}\n{END}{after}"
    with replace_atomically(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    run_command(main)
