"""The tools of this room without a process of their own."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
Tool = Callable[..., tuple[object, str, str]]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs tools/NAME.py with arguments: status, stdout, stderr."""

    def call(name: str, *arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        return (ended.value.code, *capsys.readouterr())

    return call
