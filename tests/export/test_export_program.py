"""The program: runs with PyTorch alone, any number of images, and draws what the network does."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgan_kernels import dispatch, runtime

from fastgan import config as cfg
from fastgan.common.errors import UserError
from fastgan.common.noise import seeded_latents
from fastgan.export.program import check_program, write_program
from fastgan.launch import build
from tests.export.exporting import NCSNPP, checkpoint, exported

ROOT = Path(__file__).parents[2]
# After the card's lines, in an interpreter that cannot import this project.
ALONE = """
import sys
sys.modules.update(fastgan=None, fastgan_kernels=None)
{lines}
print(images.dtype, tuple(images.shape))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [NCSNPP, {"label_dim": 5, "img_channels": 3, "attn_resolutions": [8]}]
)
def test_programs_alone(changes: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "x.safetensors", **changes)
    channels = changes.get("img_channels", 1)
    said, card = exported(source, tmp_path / "net", program=True, images=11)
    program = said["program"]
    assert program["images"] == 11 and program["values"] == 11 * 64 * channels
    assert program["off_by_one"] < program["values"] / 20
    assert said["sha256"].keys() == {"grid.png", "net.pt2", "net.safetensors"}
    with zipfile.ZipFile(tmp_path / "net/net.pt2") as archive:
        content = [archive.read(name) for name in archive.namelist()]
    assert not [data for data in content if str(ROOT).encode() in data]
    assert b"CC-BY-NC-SA-4.0" in content
    [lines] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = ALONE.format(lines=lines)
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "net")
    assert done.stdout == f"torch.uint8 (16, {channels}, 8, 8)\n", done.stderr
    network, _ = build.saved_network(str(tmp_path / "net/net.safetensors"), torch.device("cpu"))
    images = build.sample_fn(network, cfg.SamplerConfig(), torch.device("cpu"))(list(range(3)))
    with pytest.raises(UserError, match=r"differ from the network's by .*net\.pt2"):
        check_program(tmp_path / "net/net.pt2", network, images.flip(0))


def test_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only PyTorch's operators, also where the environment asks for kernels of this project, and
    the network's images, to rounding."""
    source = checkpoint(tmp_path / "x.safetensors", channel_mult=[1])
    network, _ = build.saved_network(str(source), torch.device("cpu"))
    monkeypatch.setenv("FASTGAN_KERNELS", "triton")
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    assert dispatch.implementation("group_norm_silu", "cpu", torch.float32) == "triton"
    write_program(network, tmp_path / "x.pt2", {})
    monkeypatch.delenv("FASTGAN_KERNELS")
    program = torch.export.load(tmp_path / "x.pt2")
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    origins = {name.partition(".")[0] for name in calls}
    assert len(calls) > 50 and origins <= {"aten", "<built-in function getitem>"}
    z, _ = seeded_latents([0, 1, 2], (1, 8, 8))
    images = build.sample_fn(network, cfg.SamplerConfig(), torch.device("cpu"))([0, 1, 2])
    drawn = program.module()(z.float())
    assert drawn.dtype == torch.uint8 and (drawn.int() - images.int()).abs().max() <= 1
    assert drawn.float().std() > 10
