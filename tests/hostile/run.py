"""python -m tests.hostile.run SUITE: judges the cases of tests/hostile/SUITE.py, a line each."""

import sys
import tempfile
from importlib import import_module
from pathlib import Path

from tests.hostile.harness import as_line, run_cases


def main() -> None:
    suite = import_module(f"tests.hostile.{sys.argv[1]}").SUITE
    with tempfile.TemporaryDirectory() as folder:
        for outcome in run_cases(suite, Path(folder) / "case"):
            print(as_line(outcome), flush=True)


if __name__ == "__main__":
    main()
