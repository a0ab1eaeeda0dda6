"""Everything that a bare GPU machine should tell, in cases that stop and resume.

The same command continues where it was stopped; what is finished is kept. See docs/gpu-report.md.
"""

import os
import shlex
import signal
import sys
import traceback
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

# On a bare machine nothing is installed: the packages are those beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastgan.common.errors import ArgumentParser, UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("hydra", "omegaconf", "antlr4")


def main() -> int:
    options = _parser().parse_args()
    bring_hydra(ROOT / "wheels")
    # The configuration's schema, which they read, needs Hydra.
    from benchmarks.gpu_report import parts, run, table
    from benchmarks.measure import ON_GPU

    tiny, plan = options.tiny, parts.plan()
    chosen = parts.select(plan, [options.one] if options.one else options.part)
    out = options.out or Path("runs/gpu-report-tiny" if tiny else "runs/gpu-report")
    if options.plan:
        print(parts.printed(chosen))
        return 0
    if not (tiny or options.summary or ON_GPU):
        raise UserError(
            "no GPU, on this machine, --tiny for a dry run or --summary for results brought here "
            "would do"
        )
    if options.one:
        place = run.Place(out, options.one, tiny)
        place.note(chosen[0].measure(place), complete=True)
        return 0
    # Also the cases that run end with this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    runner, targets = run.Runner(out, tiny, options.minutes), table.read_targets(ROOT)
    for _ in chain([()], runner.run(() if options.summary else chosen)):
        try:
            table.write_report(table.collect(out, plan, tiny), out, targets, tiny)
        except UserError:
            raise
        except Exception:
            # A result that the tables cannot take is no reason to measure no others.
            traceback.print_exc()
    print(f"{out / 'report.md'}: written")
    if options.update:
        print(f"{table.record(table.collect(out, plan, tiny), ROOT)}: written")
    if runner.left:
        print(f"left: {', '.join(runner.left)}")
        print(f"continue with: {shlex.join(['python', *sys.argv])}")
    return 1 if runner.failed else 0


def bring_hydra(folder: Path) -> None:
    """Makes what `make gpu-wheels` brought importable, here and in processes begun from here; what
    is installed wins. UserError: Hydra is neither there nor installed."""
    sys.path.append(str(folder))
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""), str(folder)]
    missing = [name for name in NEEDED if not _importable(name)]
    if missing:
        raise UserError(
            f"{', '.join(missing)} cannot be imported, on this machine or from {folder}, "
            "`make gpu-wheels` where there is a network would fill it"
        )
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--plan", action="store_true", help="print what runs in which order, with its seconds")
    add("--part", nargs="+", default=[], help="parts, or cases PART/CASE (default: all)")
    add("--out", type=Path, metavar="FOLDER", help="default: runs/gpu-report, tiny -tiny behind it")
    add("--minutes", type=float, metavar="M", help="stop before M minutes are over")
    add("--summary", action="store_true", help="measure nothing, write the report")
    add("--update", action="store_true", help="record an H200's results in benchmarks/")
    add("--tiny", action="store_true", help="a dry run on the CPU: no speeds")
    add("--one", metavar="CASE", help="run this one here: what each case's process does")
    return parser


if __name__ == "__main__":
    run_command(main)
