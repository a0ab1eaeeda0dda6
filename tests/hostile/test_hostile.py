"""Every parser on hostile files, the commands on a few of them, and the harness itself."""

from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from tests.command_line import CommandLine, network_file
from tests.hostile.bad_parser import MISDEEDS
from tests.hostile.harness import PARSERS, ROOT, Case, contents, run_apart

IMPORT = ROOT / "tools" / "import_edm.py"
# All of them in one process: its start takes as long as the cases.
SPREAD = pytest.param(PARSERS, 2, 200, id="a spread of all")
WHOLE = [pytest.param([p], 10**6, 335, marks=pytest.mark.slow, id=p) for p in PARSERS]


@pytest.mark.parametrize(("parsers", "most", "least"), [SPREAD, *WHOLE])
def test_every_file_is_refused_or_sound(parsers: list[str], most: int, least: int) -> None:
    outcomes = run_apart(*parsers, most=most)
    failed = [f"{o.parser} {o.kind} {o.name}: {o.told}" for o in outcomes if o.ending == "failed"]
    assert not failed, "\n".join([f"{len(failed)} of {len(outcomes)} cases:", *failed[:20]])
    assert len({(o.parser, o.kind, o.name) for o in outcomes}) == len(outcomes) >= least
    for parser in {o.parser for o in outcomes}:
        assert {"valid", "flip", "cut"} <= {o.kind for o in outcomes if o.parser == parser}
        endings = Counter(o.ending for o in outcomes if o.parser == parser)
        assert endings["refused"] > endings.total() / 3 and endings["valid"], (parser, endings)


def test_every_misdeed_is_noticed() -> None:
    told = {outcome.name: outcome for outcome in run_apart("bad_parser")}
    assert told.keys() == MISDEEDS.keys()
    for name, (_, said) in MISDEEDS.items():
        outcome = told[name]
        assert outcome.ending == ("failed" if said else "valid"), outcome
        assert said in outcome.told, outcome


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(AssertionError, match="died after nothing"):
        run_apart("absent_parser")


@cache  # the cases are made where they are used, not when tests are collected
def few_refused(parser: str) -> list[Case]:
    """Four cases that have to be refused, of kinds that lie apart."""
    kinds = {c.kind: c for c in import_module(f"tests.hostile.{parser}").SUITE.cases()
             if c.expected == "refused" and c.kind != "place"}  # fmt: skip
    return list(kinds.values())[:: max(1, len(kinds) // 4)][:4]


def put(path: Path, case: Case) -> Path:
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content)
    return path


# For every file that a command reads: what it is named, and the command.
COMMANDS = {
    "dataset_zip": ("data.zip", ["train", "data.path={path}", "run_dir=run"]),
    "dataset_json": ("dataset.json", ["train", "data.path={folder}", "run_dir=run"]),
    "network_file": ("net.safetensors", ["train", "init.path={path}", "run_dir=run"]),
    "config_yaml": ("config.yaml", ["train", "run_dir={folder}"]),
    "statistics_npz": ("ref.npz", ["evaluate", "checkpoint={network}", "out=fid.json", "seeds=0-3",
                                   "extractor=pca:4", "images={path}", "checkpoint=null",
                                   "reference=digits/val"]),
}  # fmt: skip


@pytest.mark.parametrize("parser", COMMANDS)
def test_a_command_refuses_it_in_one_line(
    parser: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, one line, nothing left behind."""
    command = CommandLine(tmp_path / "here", capsys, monkeypatch)
    name, (verb, *settings) = COMMANDS[parser]
    network = network_file(tmp_path / "net.safetensors")
    for number, case in enumerate(few_refused(parser)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for other, content in import_module(f"tests.hostile.{parser}").SUITE.beside.items():
            (folder / other).write_bytes(content)
        given = {"path": put(folder / name, case), "folder": folder, "network": network}
        overrides = [setting.format(**given) for setting in settings]
        overrides += ["experiment=demo"] if verb == "train" else []
        before = contents(tmp_path)
        ended = command(verb, "device=cpu", *overrides)
        assert contents(tmp_path) == before, case
        assert ended.code == 1 and "Traceback" not in ended.err, ended
        lines = ended.err.splitlines()
        assert lines[-1].startswith("error: ") and lines[-1].isprintable(), ended
        if verb == "train":
            assert len(lines) == 1 and str(folder) in lines[0], ended
            assert parser == "config_yaml" or not ended.out, ended
