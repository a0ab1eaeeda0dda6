"""What hangs in a step's case does not take the others' time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_report.parts import AGAIN, ROOT


@pytest.mark.parametrize("settled", [False, True])
def test_what_hangs_ends_its_process(settled: bool, tmp_path: Path) -> None:
    """A settled variant is left out; one that was being set up may have compiled for long."""
    program = f"""
import json, pathlib, time
from fastgan.performance.report import rounds
progress = rounds.Progress(pathlib.Path({str(tmp_path / "x.json")!r}), "demo")
noted = progress.variant("a")
noted["facts"] = {{}} if {settled} else None
progress.save()
rounds._guarded(lambda: time.sleep(30), noted, progress, 1, 0.2)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == AGAIN and "in <lambda>" in done.stderr, done.stderr
    noted = json.loads((tmp_path / "x.json").read_text())["variants"]["a"]
    assert noted["error"] == ("did not end in 0 s" if settled else None)
