"""Proves that the tests can fail: breaks the method in one line at a time and runs the test for it.

Every mutant is applied to a copy of the repository; its test must pass before and fail after.
Prints a row per mutant and exits with 1 if one survives or no longer applies.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from fastgan.common.errors import ArgumentParser, UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("kernels", "fastgan", "configs", "tests", "tools")


@dataclass(frozen=True)
class Mutant:
    """One line of the method made wrong, and the test that must notice."""

    what: str
    file: str
    right: str
    wrong: str
    test: str


def mutants() -> list[Mutant]:
    """Those of tests/mutants.toml."""
    entries = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    return [Mutant(**entry) for entry in entries]


def kills(mutant: Mutant) -> bool:
    """Whether the mutant's test fails on a copy with the mutation (and passes without it)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        if not _passes(copy, mutant.test):
            raise UserError(f"{mutant.test} fails without a mutation, a green test expected")
        file = copy / mutant.file
        text = file.read_text()
        if text.count(mutant.right) != 1:
            raise UserError(
                f"mutant {mutant.what!r} finds its line {text.count(mutant.right)} times in "
                f"{mutant.file}, exactly once expected"
            )
        file.write_text(text.replace(mutant.right, mutant.wrong))
        return not _passes(copy, mutant.test)


def _passes(folder: Path, test: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    # The copy's own packages must win over installed ones.
    path = os.pathsep.join((str(folder), str(folder / "kernels")))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode not in (0, 1):
        raise UserError(f"{test} did not run: {done.stdout.strip().splitlines()[-1:]}")
    return done.returncode == 0


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--only", metavar="TEXT", default="", help="mutants whose title has TEXT")
    args = parser.parse_args()
    survivors = 0
    for mutant in (m for m in mutants() if args.only in m.what):
        verdict = "" if args.list else ("killed" if kills(mutant) else "SURVIVED")
        survivors += verdict == "SURVIVED"
        print(f"{verdict:9} {mutant.what:58} {mutant.test}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    run_command(main)
