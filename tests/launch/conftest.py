"""The commands in this process, from an empty folder."""

from pathlib import Path

import pytest

from tests.command_line import CommandLine, network_file


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    monkeypatch.setattr("fastgan.launch.run.GRID_SEEDS", [0, 1])  # 64 take longer than training
    return CommandLine(tmp_path / "here", capsys, monkeypatch)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(network_file(tmp_path / "tiny.safetensors"))
