"""The commands themselves on hostile files: exit 1, one line, nothing left behind, nothing run."""

import json
import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from tests.command_line import CommandLine, dataset_zip, network_file
from tests.hostile import (
    test_hostile_config_yaml,
    test_hostile_dataset_json,
    test_hostile_dataset_zip,
    test_hostile_edm_pickle,
    test_hostile_network_file,
    test_hostile_statistics_npz,
)
from tests.hostile.harness import ROOT, Case, contents

PER_PARSER = 8
IMPORT = ROOT / "tools" / "import_edm.py"


@cache  # the cases are made where they are used, not when tests are collected
def refused(parser: ModuleType) -> list[Case]:
    """A few cases that have to be refused, of as many kinds as there are."""
    fixed = [c for c in parser.cases() if c.expected == "refused" and isinstance(c.content, bytes)]
    by_kind = list({case.kind: case for case in fixed}.values())
    others = [case for case in fixed[:: len(fixed) // PER_PARSER] if case not in by_kind]
    return [*by_kind, *others][:PER_PARSER]


each_case = pytest.mark.parametrize("number", range(PER_PARSER))


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    return CommandLine(tmp_path / "here", capsys, monkeypatch)


def put(path: Path, case: Case) -> Path:
    assert isinstance(case.content, bytes)
    path.write_bytes(case.content)
    return path


def train(command: CommandLine, *overrides: str) -> str:
    """The line that refuses a training; nothing may have changed."""
    before = contents(command.folder.parent)
    ended = command("train", "experiment=demo", "device=cpu", "run_dir=run", *overrides)
    assert contents(command.folder.parent) == before
    assert ended.error.isprintable() and not ended.out
    return ended.error


@each_case
def test_training_on_a_hostile_zip(command: CommandLine, tmp_path: Path, number: int) -> None:
    assert "data.zip" in train(
        command,
        f"data.path={put(tmp_path / 'data.zip', refused(test_hostile_dataset_zip)[number])}",
    )


@each_case
def test_training_on_hostile_labels(command: CommandLine, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in test_hostile_dataset_json.SUITE.beside.items():
        (folder / name).write_bytes(content)
    put(folder / "dataset.json", refused(test_hostile_dataset_json)[number])
    assert "dataset.json" in train(command, f"data.path={folder}")


@each_case
def test_training_from_a_hostile_network(command: CommandLine, tmp_path: Path, number: int) -> None:
    path = put(tmp_path / "net.safetensors", refused(test_hostile_network_file)[number])
    assert "net.safetensors" in train(command, f"init.path={path}")
    ended = command("sample", f"checkpoint={path}", "out=images", "device=cpu")
    assert "net.safetensors" in ended.error and command.files() == []


@each_case
def test_evaluating_with_a_hostile_reference(
    command: CommandLine, tmp_path: Path, number: int
) -> None:
    path = put(tmp_path / "reference.npz", refused(test_hostile_statistics_npz)[number])
    network = network_file(tmp_path / "net.safetensors")
    ended = command(
        "evaluate", f"checkpoint={network}", "out=fid.json", "device=cpu", "seeds=0-3",
        "extractor=pca:4", f"images={path}", "checkpoint=null", "reference=digits/val",
    )  # fmt: skip
    assert ended.code == 1 and "Traceback" not in ended.err and command.files() == []
    assert ended.err.splitlines()[-1].startswith("error: ")


@each_case
def test_taking_up_a_hostile_run(command: CommandLine, number: int) -> None:
    (command.folder / "run").mkdir()
    put(command.folder / "run" / "config.yaml", refused(test_hostile_config_yaml)[number])
    before = contents(command.folder)
    ended = command("train", "experiment=demo", "device=cpu", "run_dir=run", "total_images=4800")
    assert ended.code == 1 and ended.err.count("\n") == 1 and ended.err.startswith("error: run")
    assert contents(command.folder) == before


@each_case
def test_importing_a_hostile_pickle(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = put(tmp_path / "edm.pkl", refused(test_hostile_edm_pickle)[number])
    monkeypatch.setattr(sys, "argv", [str(IMPORT), str(source), str(tmp_path / "out.safetensors")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(IMPORT), run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 1 and not out and err.startswith("error: ")
    assert err.count("\n") == 1 and err.rstrip("\n").isprintable() and "edm.pkl" in err
    assert os.listdir(tmp_path) == ["edm.pkl"]


def test_in_processes_of_their_own(tmp_path: Path) -> None:
    """As a user starts them: no traceback from the interpreter's end either."""
    pickle = put(tmp_path / "edm.pkl", refused(test_hostile_edm_pickle)[0])
    data = dataset_zip(tmp_path / "data.zip", 16, None)
    data.write_bytes(data.read_bytes()[:-40])
    commands = [
        [str(IMPORT), str(pickle), str(tmp_path / "out.safetensors")],
        [
            "-m",
            "fastgan.train",
            "experiment=demo",
            "device=cpu",
            f"data.path={data}",
            "run_dir=run",
        ],
        ["-m", "fastgan.train", "experiment=demo", "batch=" + "9" * 5000],
    ]
    before = contents(tmp_path)
    for arguments in commands:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and not done.stdout, json.dumps(arguments)[:200]
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert contents(tmp_path) == before
