"""Everything that a bare GPU machine should tell, in parts that stop and resume.

The same command continues where it was stopped; what is finished is kept. See docs/gpu-report.md.
"""

import sys
from pathlib import Path
from typing import Any

# On a bare machine nothing is installed: the packages are those beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from benchmarks.gpu_report.wheels import hydra_importable
from fastgan.common.errors import ArgumentParser, UserError, run_command

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    options = _parser().parse_args()
    with hydra_importable(ROOT / "wheels") as unpacked:
        # It reads the configuration's schema, which needs Hydra.
        from benchmarks.gpu_report import command

        cases, parts = command.prepare(options)
        if options.list:
            command.list_cases(cases, parts)
            return 0
        content, run = command.measure(options, cases, parts, unpacked)
        if options.update:
            record(content, run.out, ROOT)
        return command.conclude(options, run)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--part",
        nargs="+",
        default=[],
        metavar="PART",
        help="parts, or single cases of them as PART/CASE (default: all)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: runs/gpu-report, tiny -tiny behind it"
    )
    parser.add_argument("--list", action="store_true", help="print the cases with their minutes")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop before M minutes are over")
    parser.add_argument("--again", action="store_true", help="measure anew what is finished too")
    parser.add_argument("--summary", action="store_true", help="measure nothing, write the report")
    parser.add_argument("--pack", type=Path, metavar="FILE.tar.gz", help="the folder as an archive")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU: no speeds")
    parser.add_argument(
        "--update", action="store_true", help="record an H200's results in benchmarks/"
    )
    return parser


def record(content: dict[str, Any], out: Path, root: Path) -> None:
    """Writes benchmarks/results/h200-DATE/ below `root` and the rows of targets.json that were
    measured. UserError, and nothing is written, where the report is not of an H200."""
    from benchmarks import summarise
    from benchmarks.gpu_report import kernel_benchmarks
    from benchmarks.gpu_report.record import write_record
    from benchmarks.gpu_report.report import require_record
    from benchmarks.gpu_report.results import write_json
    from benchmarks.results import Results, load

    require_record(content, summarise.TARGET_MACHINE)
    machine = content["environment"]
    facts = {"chip": {"name": machine["chip"]}, "datetime": machine["datetime"]}
    results = Results([], [], facts)
    folder = f"benchmarks/results/{summarise.TARGET_MACHINE.lower()}-{results.date}"
    targets = summarise.read_targets(root)
    found = write_record(content, root / folder, {target["id"] for target in targets})
    for target in targets:
        if target["id"] in found:
            value, file = found[target["id"]]
            target |= summarise.verdict(target, value, results)
            target["result_file"] = f"{folder}/{file}"
    write_json(root / "benchmarks/targets.json", targets)
    summarise.write_readme(root / "benchmarks/README.md", targets)
    print(f"{folder}: written, with {len(found)} targets")
    for op, files in kernel_benchmarks.result_files(out).items():
        try:
            summarise.update(load(files), root)
        except UserError as error:
            print(f"not recorded: {op}: {error}")


if __name__ == "__main__":
    run_command(main)
