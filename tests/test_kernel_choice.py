"""kernels= and FASTGAN_KERNELS as a user meets them."""

from pathlib import Path

import pytest
import torch
from fastgan_kernels import dispatch

from fastgan.common.errors import UserError
from fastgan.launch.engine import select_kernels
from tests.command_line import CommandLine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_configured", "auto")


@pytest.mark.parametrize("setting", ["auto", "library", "reference", "triton"])
def test_what_can_run_is_taken(setting: str) -> None:
    select_kernels(setting, CPU)
    expected = "reference" if setting == "auto" else setting
    assert dispatch.implementation("group_norm_silu", "cpu", torch.float32) == expected


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("fast", "no 'fast', in FASTGAN_KERNELS=fast, one of auto, triton, library, reference"),
        ("conv=library", "no op 'conv', in FASTGAN_KERNELS=conv=library, one of group_norm_silu"),
        ("attention=xformers", "attention cannot run as xformers"),
    ],
)
def test_a_wrong_variable_is_named(
    variable: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, variable)
    with pytest.raises(UserError, match=message) as caught:
        select_kernels("auto", CPU)
    assert "\n" not in str(caught.value)


def test_triton_on_a_cpu_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgan_kernels.runtime.INTERPRETED", False)
    command = CommandLine(tmp_path / "empty", capsys, monkeypatch)
    settings = ("experiment=demo", "kernels=triton", "device=cpu", "run_dir=run")
    assert command("train", *settings).error == (
        "error: group_norm_silu cannot run as triton (CPU tensors need TRITON_INTERPRET=1), as "
        "kernels=triton asks, reference or auto would"
    )
    assert command.files() == []
