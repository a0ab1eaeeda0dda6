"""tools/gpu_report.py: a dry run on a bare machine, mistakes, stopping and going on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch

from benchmarks.gpu_report import runner
from benchmarks.gpu_report.markdown import DRY_RUN, markdown
from benchmarks.gpu_report.parts import AGAIN, BESIDE, RESULT, ROOT, Case, all_parts, select
from benchmarks.gpu_report.report import chips, forget
from benchmarks.gpu_report.wheels import hydra_importable, unpack
from fastgan import config as cfg
from fastgan.common.errors import UserError, run_command
from tools import gpu_report

# The dry run is some fifteen processes, more than a minute of one core of its own.
pytestmark = pytest.mark.timeout(900)
PACKAGES = ("hydra", "omegaconf", "antlr4")
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
DRY_PARTS = ["environment", "rates", "parity", "kernels/resize_normalize-CIFAR"]
DRY_PARTS += ["steps/cifar10_uncond_d2o_f", "traces/cifar10_uncond_d2o_f-plain"]
DRY_PARTS += ["ablation/imagenet64_d2o_f-compile", "cifar10/real"]


class Bare:
    """A copy of the tool in a tree where Hydra is hidden; `wheels/` may bring it along."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        (self.root / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "tools/gpu_report.py", self.root / "tools")
        for name in ("fastgan", "kernels", "benchmarks"):
            (self.root / name).symlink_to(ROOT / name)
        hidden = folder / "hidden"
        hidden.mkdir()
        (hidden / "sitecustomize.py").write_text(WITHOUT_HYDRA)
        # Where it finds xdist's variables, pytest-benchmark measures nothing.
        outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        self.environment = outside | {"PYTHONPATH": str(hidden), "OMP_NUM_THREADS": "1"}

    def bring_wheels(self) -> None:
        (self.root / "wheels").mkdir()
        packages = Path(hydra.__file__).parent.parent
        for name in PACKAGES:
            with zipfile.ZipFile(self.root / f"wheels/{name}-1-py3-none-any.whl", "w") as wheel:
                for file in sorted((packages / name).rglob("*")):
                    if file.is_file() and "__pycache__" not in file.parts:
                        wheel.write(file, file.relative_to(packages))

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/gpu_report.py", *words]
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True
        )


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bare, Path, str]:
    """A dry run of every part on a bare machine: the machine, its folder and what was printed."""
    bare = Bare(tmp_path_factory.mktemp("bare"))
    bare.bring_wheels()
    done = bare("--tiny", "--out", "out", "--part", *DRY_PARTS, "--pack", "out.tar.gz")
    assert done.returncode == 0, done.stdout + done.stderr
    return bare, bare.root / "out", done.stdout


def test_a_dry_run_of_every_part_without_hydra(dry: tuple[Bare, Path, str]) -> None:
    bare, out, printed = dry
    report = read(out / "report.json")
    assert report["dry_run"] and chips(report) == {"CPU"}
    assert {part.name for part in all_parts()} <= report.keys()
    assert all(f"{name}: failed" not in printed for name in DRY_PARTS)
    for part in ("environment", "rates", "parity"):
        assert read(out / f"{part}.json") == report[part], "complete parts have a file"
    assert not (out / "steps.json").exists() and "steps/ffhq64_d2o_f" in report["missing"]
    keys = {"chip", "copy_bandwidth", "matmul_rate", "conv_forward_efficiency"}
    assert keys | {"conv_dgrad_efficiency"} <= report["rates"].keys()
    assert report["parity"]["passed"] > 3 and report["parity"]["failed"] == 0
    assert {row["candidate"] for row in report["kernels"]["rows"]} >= {"eager", "compile", "ours"}
    text = (out / "report.md").read_text()
    assert DRY_RUN in text and text == markdown(report)
    with tarfile.open(bare.root / "out.tar.gz") as archive:
        names = archive.getnames()
    assert "out/report.md" in names and not any("caches" in name for name in names)


def test_every_engine_takes_its_turn(dry: tuple[Bare, Path, str]) -> None:
    content = read(dry[1] / "steps/cifar10_uncond_d2o_f.json")
    names = {"plain-published", "plain-bf16"}
    names |= {f"{engine.value}-bf16" for engine in cfg.Engine}
    assert {name for name in content["variants"] if not name.endswith("-shared")} == names
    for each in content["variants"].values():
        assert each["error"] is None and each["img_s"] > 0 and each["attempts"] == 1
    assert set(content["ratios"]["plain-published"]) == set(content["variants"]) - {
        "plain-published"
    }
    assert not list((dry[1] / "steps").glob("*.progress.json"))


def test_rows_of_an_ablation_take_their_turns(dry: tuple[Bare, Path, str]) -> None:
    report = read(dry[1] / "report.json")["ablation"]
    rows = report["experiments"]["imagenet64_d2o_f"]["rows"]
    assert list(rows) == ["published", "layout", "precision", "compile"]
    assert all(each["error"] is None and each["img_s"] > 0 for each in rows.values())
    assert [each["above"] for each in rows.values()] == [None, *list(rows)[:3]]
    gains = [rows[name]["gain"]["median"] for name in list(rows)[1:]]
    assert rows["compile"]["total"] == pytest.approx(gains[0] * gains[1] * gains[2])
    assert (dry[1] / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_measured_again(dry: tuple[Bare, Path, str]) -> None:
    bare, out, _ = dry
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
    done = bare("--tiny", "--out", "out", "--part", *DRY_PARTS)
    assert done.returncode == 0 and "elapsed" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")} == before


def test_without_wheels_one_line_says_what_to_do(tmp_path: Path) -> None:
    done = Bare(tmp_path)("--list")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: hydra, omegaconf, antlr4 cannot be imported")
    assert "make gpu-wheels" in done.stderr


@pytest.mark.parametrize("member", ["../outside.py", "/outside.py", "a/../../outside.py"])
def test_a_wheel_stays_in_its_folder(member: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("inside.py", "")
        wheel.writestr(member, "")
    with pytest.raises(UserError, match="leads outside"):
        unpack(tmp_path / "x.whl", tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.whl"]


def test_installed_packages_are_taken_as_they_are(tmp_path: Path) -> None:
    before = list(sys.path)
    with hydra_importable(tmp_path / "absent") as folder:
        assert folder is None and sys.path == before


def called(capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, *words: str) -> Any:
    """The command in this process: exit status, stdout, stderr."""
    patch.setattr("sys.argv", ["tools/gpu_report.py", *words])
    with pytest.raises(SystemExit) as end:
        run_command(gpu_report.main)
    return end.value.code, *capsys.readouterr()


def cpu_results(out: Path) -> None:
    """A folder in which a (made up) measurement of a CPU lies."""
    runner.claim(out, False)
    facts = {"chip": "CPU", "dry_run": True, "datetime": "2030-01-02T03:04:05+00:00"}
    nothing = {"gpu": None, "nvidia_smi": None, "software": {}, "packages": {}, "commit": None}
    (out / "environment.json").write_text(json.dumps(facts | nothing))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part", "nix"], "no part nix, --part, one of environment, rates,"),
        (["--part", "steps/nix"], "no part steps/nix"),
        (["--tiny", "--out", "{file}"], "cannot write"),
        (["--tiny", "--out", "{file}/below"], "cannot write"),
        (["--update"], "no GPU, --update,"),
        ([], "no GPU, on this machine,"),
        (["--tiny", "--update"], "a dry run is no measurement"),
        (["--summary", "--out", "{tmp}/absent"], "no results"),
        (["--summary", "--update", "--out", "{cpu}"], "results of a CPU"),
        (["--tiny", "--out", "{cpu}"], "holds a measurement"),
        (["--summary", "--out", "{cpu}", "--pack", "{tmp}/x.zip"], "no name of an archive"),
        (["--tiny", "--pack", "{tmp}/x.zip"], "no name of an archive"),
        (["--tiny", "--pack", "{tmp}/absent/x.tar.gz"], "no folder"),
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    cpu_results(tmp_path / "cpu")
    record = [ROOT / "benchmarks/targets.json", ROOT / "benchmarks/README.md"]
    before = [path.read_bytes() for path in record]
    places = {"file": tmp_path / "file", "cpu": tmp_path / "cpu", "tmp": tmp_path}
    code, _, err = called(capsys, monkeypatch, *(word.format(**places) for word in words))
    assert code == 1 and len(err.splitlines()) == 1 and err.startswith(f"error: {said}"), err
    assert [path.read_bytes() for path in record] == before


def test_the_list_has_every_case_with_its_minutes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = called(capsys, monkeypatch, "--list")
    assert code == 0
    cases = select(all_parts(), [], False)
    assert all(f"  {case.label} " in out for case in cases)
    assert all(0 < case.seconds <= 600 for case in cases), "none longer than ten minutes"
    published = {path.stem for path in (ROOT / "configs/experiment").glob("*_d2o_f.yaml")}
    named = {case.name for case in cases if case.part == "steps"}
    assert named == published - {"cifar10_narrow_d2o_f"}
    tests = {path.stem for path in (ROOT / "tests/kernels").glob("test_*.py")}
    assert {f"test_{case.name}" for case in cases if case.part == "parity"} == tests
    benchmarks = {path.stem for path in (ROOT / "benchmarks").glob("test_*.py")}
    found = {case.name.partition("-")[0] for case in cases if case.part == "kernels"}
    assert {f"test_{name}" for name in found} == benchmarks


def script(body: str, **changes: Any) -> Case:
    """A case that runs `body`, in which `out` and `beside` are paths and `done` writes a result."""
    start = "import json, os, pathlib, sys, time\nout, beside = map(pathlib.Path, sys.argv[1:])\n"
    start += "done = lambda **c: out.write_text(json.dumps(c))\n"
    values: dict[str, Any] = {"part": "p", "name": "a", "seconds": 1.0} | changes
    return Case(command=("-c", start + body, RESULT, BESIDE), **values)


ONCE = """
count = beside.with_suffix(".count")
runs = len(count.read_text()) + 1 if count.is_file() else 1
count.write_text("x" * runs)
"""


def test_a_killed_case_is_run_again_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        script(ONCE + "done(runs=runs)"),
        script(
            ONCE + "if runs == 1: out.write_text('{'); os.kill(os.getpid(), 9)\ndone(runs=runs)"
        ),
    ]
    cases[1] = Case(**vars(cases[1]) | {"name": "b"})
    first, second = runner.Runner(tmp_path, True), runner.Runner(tmp_path, True)
    assert [case.name for case in first.run(cases)] == ["a"]
    assert first.failed["p/b"].startswith("it printed nothing (exit status -9)")
    assert not (tmp_path / "p/b.json").exists(), "nothing half-written"
    assert [case.name for case in second.run(cases)] == ["b"] and not second.failed
    found = [read(tmp_path / f"p/{name}.json")["runs"] for name in ("a", "b")]
    assert found == [1, 2]
    forget(cases[:1], tmp_path)
    assert [case.name for case in second.run(cases)] == ["a"]


def test_a_killed_report_goes_on_where_it_was(tmp_path: Path) -> None:
    """The whole command is stopped between two cases by its parent; the second run finishes."""
    command = [sys.executable, "tools/gpu_report.py", "--tiny", "--out", str(tmp_path)]
    command += ["--part", "environment", "rates/chip"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    while "rates/chip" not in first.stdout.readline():
        assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=20) == 128 + signal.SIGTERM
    before = (tmp_path / "environment.json").stat().st_mtime_ns
    assert not (tmp_path / "rates/chip.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "[1/1] rates/chip" in done.stdout
    assert (tmp_path / "environment.json").stat().st_mtime_ns == before


def test_a_case_that_asks_for_a_new_process_gets_it(tmp_path: Path) -> None:
    body = ONCE + f"if runs < 3: sys.exit({AGAIN})\ndone(runs=runs)"
    assert list(runner.Runner(tmp_path, True).run([script(body, resumes=True)]))
    assert read(tmp_path / "p/a.json") == {"runs": 3}
    refused = runner.Runner(tmp_path, True)
    assert not list(refused.run([script(body, name="b")])) and "p/b" in refused.failed


def test_minutes_stop_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would not end in time is not begun; what does not end is stopped, with its children."""
    monkeypatch.setattr(runner, "_RESERVE_SECONDS", 0)
    child = "import subprocess; subprocess.Popen([sys.executable, '-c', f'''import time\n"
    child += "time.sleep(3); open({str(beside)!r} + '.late', 'w')''']); time.sleep(30)"
    cases = [script("done()", name="short"), script(child, name="long"), script("", name="next")]
    start = time.monotonic()
    run = runner.Runner(tmp_path, False, minutes=2 / 60)
    assert [case.name for case in run.run(cases)] == ["short"]
    assert [case.name for case in run.left] == ["long", "next"] and not run.failed
    assert time.monotonic() - start < 10
    time.sleep(max(0, start + 5.5 - time.monotonic()))
    assert not (tmp_path / "p/long.late").exists()
    run = runner.Runner(tmp_path, False, minutes=1)
    cases = [script("done()", name="hours", seconds=3600), script("done()", name="seconds")]
    assert [case.name for case in run.run(cases)] == ["seconds"]
    assert [case.name for case in run.left] == ["hours"]


def test_what_hangs_leaves_time_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_LEAST_SECONDS", 2.0)
    cases = [script("time.sleep(60)", seconds=0.1), script("done()", name="b", seconds=0.1)]
    run = runner.Runner(tmp_path, False, minutes=1)
    assert [case.name for case in run.run(cases)] == ["b"]
    assert run.failed["p/a"].startswith("did not end in 2 s") and not run.left


def test_a_killed_case_that_resumes_goes_on_at_once(tmp_path: Path) -> None:
    body = ONCE + "if runs < 3: os.kill(os.getpid(), 9)\ndone(runs=runs)"
    assert list(runner.Runner(tmp_path, True).run([script(body, resumes=True)]))
    always = runner.Runner(tmp_path, True)
    assert not list(always.run([script("os.kill(os.getpid(), 9)", name="b", resumes=True)]))
    assert "exit status -9" in always.failed["p/b"]


def test_the_error_is_named_and_not_the_advice_behind_it(tmp_path: Path) -> None:
    body = (
        "print('RuntimeError: CUDA error: an illegal memory access\\nCompile with X'); sys.exit(1)"
    )
    for _ in range(2):
        run = runner.Runner(tmp_path, True)
        assert not list(run.run([script(body)]))
        assert run.failed["p/a"].startswith("RuntimeError: CUDA error: an illegal memory access (")
    assert (tmp_path / "logs/p/a.log").read_text().count("Compile with X") == 2, "nothing is lost"


def test_the_archive_is_there_before_the_end(tmp_path: Path) -> None:
    """Of what was finished when the whole command is told to end, or is killed."""
    archive = tmp_path / "x.tar.gz"
    command = [sys.executable, "tools/gpu_report.py", "--tiny", "--out", str(tmp_path / "out")]
    command += ["--part", "environment", "rates/chip", "--pack", str(archive)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    while "rates/chip" not in first.stdout.readline():
        assert first.poll() is None
    first.kill()
    first.wait(timeout=20)
    with tarfile.open(archive) as found:
        assert "out/environment.json" in found.getnames() and "out/report.md" in found.getnames()


def test_the_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tiny", "--out", str(tmp_path), "--part", "environment", "--minutes", "0"]
    code, out, _ = called(capsys, monkeypatch, *words)
    last = out.splitlines()[-2:]
    assert code == 0 and last[0] == "left: environment"
    assert last[1] == f"continue with: python tools/gpu_report.py {' '.join(words)}"
