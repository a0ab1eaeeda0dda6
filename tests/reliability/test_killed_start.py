"""Killed at every system call with which a run directory begins, the same command still starts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from fastgan import config as cfg
from fastgan.launch.cli import compose
from fastgan.launch.run_dir import open_run_dir
from tests.processes import ROOT
from tests.reliability.ptrace import Kill, in_child, run_traced, tree

_WORKER = "from tests.reliability.test_killed_start import worker; worker()"


def worker() -> None:
    """Prints, for the undisturbed start and for a kill at each call: status, files in the end."""
    told = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        config = compose("train", cfg.TrainConfig, ["experiment=demo", f"run_dir={place / 'run'}"])
        calls = run_traced(lambda: open_run_dir(config), place).calls
        told.append([0, tree(place)])
        for at in range(len(calls)):
            shutil.rmtree(place / "run")
            status = run_traced(lambda: open_run_dir(config), place, Kill(at)).status
            in_child(lambda: open_run_dir(config))
            for left in (place / "run").glob(".*.part"):  # the loop sweeps them
                left.unlink()
            told.append([status, tree(place)])
    print(json.dumps(told))


def test_the_same_command_starts() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.check_output([sys.executable, "-c", _WORKER], cwd=ROOT, env=environment)
    (_, whole), *killed = json.loads(out)
    assert {"run/config.yaml", "run/samples", "run/checkpoints"} <= whole.keys()
    assert len(killed) >= 8
    assert killed == [[-signal.SIGKILL, whole]] * len(killed)
