"""Part `parity`: the kernels' own tests on this device, file by file."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from fastgan.errors import UserError, run_command
from fastgan.performance.report.parts import ROOT, Case, module
from fastgan.performance.report.results import Content, case_parser, header, write_json

FOLDER = Path("tests/kernels")
EXPECTED = {"aot": 90, "frozen_block": 120, "norm_silu": 120}
COUNTS = ("passed", "failed", "skipped")


def cases(tiny: bool) -> list[Case]:
    """A case per file of tests (tiny: one of them, the interpreter takes minutes for all)."""
    names = [path.stem.removeprefix("test_") for path in sorted((ROOT / FOLDER).glob("test_*.py"))]
    return [
        Case("parity", name, EXPECTED.get(name, 40), module("parity", "--tests", name, tiny=tiny))
        for name in (["optional"] if tiny else names)
    ]


def run_tests(name: str) -> Content:
    """passed, failed and skipped, and where and why each failure. UserError: nothing was run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        tests = FOLDER / f"test_{name}.py"
        command = [sys.executable, "-m", "pytest", str(tests), f"--junitxml={report}"]
        done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT)
        if done.returncode not in (0, 1) or not report.is_file():
            raise UserError(f"pytest ended with {done.returncode}, {tests}, 0 or 1 was expected")
        return read_junit(report.read_text())


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
