"""tools/gpu_report.py: the plan, stopping and going on, what hangs and crashes, a bare machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch

from benchmarks.gpu_report import parts, run
from benchmarks.gpu_report.run import ROOT, Case, Runner
from benchmarks.gpu_report.table import DRY_RUN
from fastgan.common.errors import UserError, run_command
from tools import gpu_report

ABOUT = {"dry_run": True, "chip": "CPU", "datetime": "2030-01-02T03:04:05+00:00", "software": {}}
# What a stand-in's process knows: its result's path, how often it was run, and how to end well.
START = f"""
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[1])
out.parent.mkdir(parents=True, exist_ok=True)
count = out.with_suffix(".count")
runs = len(count.read_text()) + 1 if count.is_file() else 1
count.write_text("x" * runs)
about = {ABOUT!r}
def note(complete=False, **found):
    found = about | {{"table": {{"case": found}}, "complete": complete}}
    out.write_text(json.dumps(found))
"""
GOOD = "note(complete=True, runs=runs)"


class StandIns:
    """A plan of small scripts in place of the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bodies: dict[str, str] = {}
        self.cases: list[Case] = []
        monkeypatch.setattr(Runner, "command", self._command)
        monkeypatch.setattr(parts, "plan", lambda: self.cases)

    def add(self, name: str, body: str = GOOD, seconds: float = 1.0) -> None:
        self.bodies[name] = body
        self.cases.append(Case(name, seconds, lambda place: {}))

    def _command(self, case: Case) -> list[str]:
        script, result = START + self.bodies[case.name], self.out / f"{case.name}.json"
        return [sys.executable, "-S", "-c", script, str(result)]

    out = Path()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIns:
    found = StandIns(monkeypatch)
    found.out = tmp_path / "out"
    return found


def called(capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, *words: str) -> Any:
    """The command in this process: exit status, stdout, stderr."""
    patch.setattr("sys.argv", ["tools/gpu_report.py", *words])
    patch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as end:
        run_command(gpu_report.main)
    return end.value.code, *capsys.readouterr()


def noted(path: Path) -> dict[str, Any]:
    """What a stand-in noted."""
    return json.loads(path.read_text())["table"]["case"]


def test_the_plan_fits_a_loan_and_names_what_exists() -> None:
    cases = parts.plan()
    before, after = parts.printed(cases).split("-- 15 minutes of a GPU end here --")
    names = [line.split()[0] for line in before.splitlines()[1:]]
    assert names[1:6] == [
        *("parity/kernels", "rates/chip", "steps/cifar10_uncond_d2o_f"),
        *("kernels/norm_silu-ImageNet", "kernels/frozen_block-ImageNet"),
    ]
    assert {name.partition("/")[0] for name in names} >= {"steps", "ablation", "rates"}
    assert float(before.split()[-1]) <= 15 * 60 and "cifar10/pretrain" in after
    assert all((ROOT / f"tests/kernels/test_{op}.py").is_file() for op in parts.OPS)
    for case in cases:
        if case.part in ("steps", "ablation"):
            name = case.name.partition("/")[2]
            assert (ROOT / f"configs/experiment/{name}.yaml").is_file()
    assert [case.name for case in parts.select(cases, ["kernels/resample"])] == [
        f"kernels/resample-{network}" for network in ("ImageNet", "FFHQ", "CIFAR")
    ]
    with pytest.raises(UserError, match="no part nix, --part, one of environment, parity, rates"):
        parts.select(cases, ["nix"])


def test_a_dry_run_of_stand_ins_stops_and_goes_on(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that crashes costs itself only, keeps what it noted, and alone is run again."""
    out_folder = stand_ins.out
    stand_ins.add("parity/a")
    crash = "print('RuntimeError: CUDA error: an illegal address\\nCompile with X', flush=True)"
    crash += "; note(noted=1); os.kill(os.getpid(), 9)"
    stand_ins.add("steps/c", f"if runs == 1: {crash}\n{GOOD}")
    stand_ins.add("rates/d", "note(half=True); sys.exit(0)")
    stand_ins.add("kernels/e")
    words = ["--tiny", "--out", str(out_folder)]
    code, out, _ = called(capsys, monkeypatch, *words)
    assert code == 1 and "parity/a, 0.0 min elapsed" in out
    assert "steps/c: failed: RuntimeError: CUDA error: an illegal address (exit status -9)" in out
    assert noted(out_folder / "steps/c.json") == {"noted": 1}
    report = (out_folder / "report.md").read_text()
    assert DRY_RUN in report and "|  | runs |" in report
    assert "- steps/c: RuntimeError: CUDA error" in report and "- rates/d: " in report
    stand_ins.bodies["rates/d"] = GOOD
    (out_folder / "rates/d.json").write_text("{")
    code, out, _ = called(capsys, monkeypatch, *words)
    assert code == 0 and "kernels/e" not in out and "parity" not in out
    counts = [noted(out_folder / f"{case.name}.json")["runs"] for case in stand_ins.cases]
    assert counts == [1, 2, 2, 1]
    assert "## Missing" not in (out_folder / "report.md").read_text()
    assert (out_folder / "logs/steps/c.log").read_text().count("Compile with X") == 1


def test_minutes_stop_cleanly(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would not end in time is not begun; what does not end is stopped, with its children."""
    monkeypatch.setattr(run, "RESERVE_SECONDS", 0)
    child = "import subprocess; subprocess.Popen([sys.executable, '-S', '-c', f'''import time\n"
    child += "time.sleep(2); open({str(out)!r} + '.late', 'w')''']); note(a=1); time.sleep(30)"
    stand_ins.add("p/hours", seconds=3600)
    stand_ins.add("p/short", seconds=0.1)
    stand_ins.add("p/long", child, seconds=0.5)
    stand_ins.add("p/next", seconds=0.1)
    runner = Runner(stand_ins.out, False, minutes=1.5 / 60)
    start = time.monotonic()
    assert [case.name for case in runner.run(stand_ins.cases)] == ["p/short", "p/long"]
    assert runner.left == ["p/hours", "p/long", "p/next"] and time.monotonic() - start < 9
    assert "time is up" in capsys.readouterr().out
    time.sleep(max(0, start + 4 - time.monotonic()))
    assert not (stand_ins.out / "p/long.json.late").exists()


def test_what_hangs_leaves_time_for_the_others(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "LEAST_DRY_SECONDS", 1.0)
    stand_ins.add("p/a", "note(built=1); time.sleep(60)", seconds=0.1)
    stand_ins.add("p/b")
    words = ["--tiny", "--out", str(stand_ins.out)]
    code, out, _ = called(capsys, monkeypatch, *words)
    assert code == 1 and "p/a: failed: did not end in 1 s, 0 were expected" in out
    assert noted(stand_ins.out / "p/a.json") == {"built": 1}
    assert noted(stand_ins.out / "p/b.json") == {"runs": 1}
    code, out, _ = called(capsys, monkeypatch, *words, "--minutes", "0")
    assert code == 0 and out.splitlines()[-2:] == [
        "left: p/a",
        f"continue with: python tools/gpu_report.py {' '.join(words)} --minutes 0",
    ]


def test_cases_end_with_the_report(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told to end, it takes the case that runs along."""
    late = "time.sleep(1); pathlib.Path(str(out) + '.late').touch()"
    stand_ins.add("p/a", f"note(pid=os.getpid()); os.kill(os.getppid(), 15); {late}")
    before = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setattr("sys.argv", ["gpu_report.py", "--tiny", "--out", str(stand_ins.out)])
        with pytest.raises(SystemExit) as end:
            gpu_report.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 128 + signal.SIGTERM
    pid = noted(stand_ins.out / "p/a.json")["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    time.sleep(1.2)
    assert not (stand_ins.out / "p/a.json.late").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part", "steps/nix"], "no part steps/nix"),
        (["--tiny", "--out", "{tmp}/file", "--part", "environment"], "cannot write"),
        ([], "no GPU, on this machine,"),
        (["--summary", "--update", "--out", "{tmp}"], "measured on nothing, --update"),
        (["--minutes", "soon"], "argument --minutes: invalid float value"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("what a machine without a GPU says")
    (tmp_path / "file").touch()
    record = ROOT / "benchmarks/targets.json"
    before = record.read_bytes()
    code, _, err = called(capsys, monkeypatch, *(word.format(tmp=tmp_path) for word in words))
    assert code == 1 and len(err.splitlines()) == 1 and err.startswith(f"error: {said}"), err
    assert record.read_bytes() == before


# Hides what is installed, as a machine would that has none of it.
WITHOUT_HYDRA = """
import importlib.machinery, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("hydra", "omegaconf", "antlr4"):
            places = [p for p in sys.path if "site-packages" not in p]
            return importlib.machinery.PathFinder.find_spec(name, places) or self.absent(name)
    def absent(self, name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


class Bare:
    """A copy of the tool in a tree where Hydra is hidden; `wheels/` may bring it along."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        self.root.mkdir()
        for name in ("fastgan", "kernels", "benchmarks", "tests", "configs", "pyproject.toml"):
            (self.root / name).symlink_to(ROOT / name)
        (self.root / "tools").mkdir()
        shutil.copy(ROOT / "tools/gpu_report.py", self.root / "tools")
        (folder / "sitecustomize.py").write_text(WITHOUT_HYDRA)
        self.environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}

    def bring_wheels(self) -> None:
        (self.root / "wheels").mkdir()
        packages = Path(hydra.__file__).parent.parent
        for name in gpu_report.NEEDED:
            (self.root / "wheels" / name).symlink_to(packages / name)

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/gpu_report.py", *words]
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True
        )


def test_without_wheels_one_line_says_what_to_do(tmp_path: Path) -> None:
    done = Bare(tmp_path)("--plan")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: hydra, omegaconf, antlr4 cannot be imported")
    assert "make gpu-wheels" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_of_every_part_without_hydra(tmp_path: Path) -> None:
    """The parts `steps` and `ablation` are the same code."""
    bare = Bare(tmp_path)
    bare.bring_wheels()
    chosen = ["environment", "rates", "parity", "kernels/resize_normalize-CIFAR", "cifar10/real"]
    chosen += ["ablation/cifar10_uncond_d2o_f"]
    done = bare("--tiny", "--out", "out", "--part", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        str(file.relative_to(bare.root / "out")): json.loads(file.read_text())
        for file in (bare.root / "out").glob("*/*.json")
    }
    assert all(each["dry_run"] and each["chip"] == "CPU" for each in found.values())
    rows = found["ablation/cifar10_uncond_d2o_f.json"]["table"]
    assert list(rows) == ["published", "graphs"]
    assert all(row["error"] is None and row["img_s"] > 0 for row in rows.values())
    assert rows["graphs"]["total"] == pytest.approx(rows["graphs"]["vs_above"])
    parity = found["parity/kernels.json"]
    assert parity["table"]["tests"]["passed"] > 0 and not parity["failed"]
    assert found["rates/chip.json"]["conv_dgrad_flipped_efficiency"] > 0
    assert len(found["kernels/resize_normalize-CIFAR.json"]["rows"]) == 6
    (score,) = found["cifar10/real.json"]["table"].values()
    assert score["n"] > 0 and DRY_RUN in (bare.root / "out/report.md").read_text()
