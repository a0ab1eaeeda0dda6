"""Part `parity`: the kernels' own tests on this device, file by file."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_report.parts import ROOT, Case, module
from benchmarks.gpu_report.results import Content, case_parser, header, write_json
from fastgan.common.errors import UserError, run_command

FOLDER = Path("tests/kernels")
# Files that run kernels, with expected seconds; the others say nothing about a device, and follow.
KERNELS = {
    "every_op": 90,
    "norm_silu": 90,
    "norm_silu_conv": 60,
    "frozen_block": 90,
    "resample": 60,
    "resize_normalize": 60,
    "frozen_conv": 30,
    "conv_plans": 60,
    "norm_silu_tiles": 30,
    "tune_worker": 90,
}
AOT = 120
# Side by side, as the first test of a kernel compiles it. A process that hangs, or breaks the GPU,
# is named with its test and replaced.
PROCESSES = ("-n", "8", "--timeout=60", "--timeout-method=thread", "--max-worker-restart=16")
COUNTS = ("passed", "failed", "skipped")


def cases(tiny: bool) -> list[Case]:
    """A case per file of tests (tiny: one of them, the interpreter takes minutes for all)."""
    found = {path.stem.removeprefix("test_") for path in (ROOT / FOLDER).glob("test_*.py")}
    names = [*(name for name in KERNELS if name in found), *sorted(found - KERNELS.keys())]
    seconds = KERNELS | {"aot": AOT}
    return [
        Case("parity", name, seconds.get(name, 30), module("parity", "--tests", name, tiny=tiny))
        for name in (["attention"] if tiny else names)
    ]


def run_tests(name: str) -> Content:
    """passed, failed and skipped, and where and why each failure. UserError: nothing was run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        tests = FOLDER / f"test_{name}.py"
        command = [sys.executable, "-m", "pytest", str(tests), f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", "-v", *_processes()]
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode not in (0, 1) or not report.is_file():
            raise UserError(f"pytest ended with {done.returncode}, {tests}, 0 or 1 was expected")
        return read_junit(report.read_text())


def _processes() -> tuple[str, ...]:
    """On a GPU, where pytest has what that needs."""
    there = all(find_spec(name) for name in ("xdist", "pytest_timeout"))
    return PROCESSES if there and torch.cuda.is_available() else ()


def read_junit(text: str) -> Content:
    """Of the XML that pytest just wrote here."""
    found: Content = dict.fromkeys(COUNTS, 0) | {"failures": []}
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcomes = {child.tag: child for child in case}
        wrong = outcomes.get("failure", outcomes.get("error"))
        if wrong is not None:
            found["failed"] += 1
            line = (wrong.get("message") or wrong.text or "").strip().partition("\n")[0]
            found["failures"].append({"test": case.get("name"), "line": line})
        else:
            found["skipped" if "skipped" in outcomes else "passed"] += 1
    return found


def merged(found: dict[str, Content]) -> Content:
    """Sums, and the files beside them."""
    first = next(iter(found.values()))
    content: Content = {key: first[key] for key in header()}
    content |= {name: sum(each[name] for each in found.values()) for name in COUNTS}
    keys = (*COUNTS, "failures")
    content["files"] = {name: {k: each[k] for k in keys} for name, each in found.items()}
    return content


def main() -> int:
    parser = case_parser(__doc__)
    parser.add_argument("--tests", required=True, metavar="NAME", help="of tests/kernels")
    options = parser.parse_args()
    write_json(options.out, header() | run_tests(options.tests))
    return 0


if __name__ == "__main__":
    run_command(main)
