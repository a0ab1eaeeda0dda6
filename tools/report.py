"""One HTML page about a training run: samples, curves and what healthy ones look like, settings.

Works on running, finished and failed runs, fine-tuning and pre-training; changes nothing in the run
but report.html. See docs/run-report.md.
"""

import shlex
import sys
from pathlib import Path

from fastgan.common.errors import ArgumentParser, run_command
from fastgan.run_report.page import NAME, write_report


def main() -> None:
    options = _parser().parse_intermixed_args()
    command = shlex.join(["python", *sys.argv])
    print(write_report(options.run_dir, against=options.against, out=options.out, command=command))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's folder")
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN_DIR",
        help="other runs: their curves over each other, and the settings that differ",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"where to (default: RUN_DIR/{NAME})"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
