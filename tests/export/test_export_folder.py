"""The folder: what lies in it, that it works again, and that it is whole or not there."""

import json
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastgan import config as cfg
from fastgan.checkpoint.network_file import load_network_file
from fastgan.common.errors import UserError
from fastgan.data import open_dataset
from fastgan.export import command as exporting
from fastgan.export.card import write_grid
from fastgan.launch import build
from tests.command_line import CommandLine
from tests.conftest import TINY, live_network
from tests.export.exporting import NCSNPP, checkpoint, exported, result_file

TOOL = Path(__file__).parents[2] / "tools" / "export.py"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BUFFERS = ("freqs", "resample_filter")
DIGITS: dict[str, Any] = {"img_resolution": 16, "precond": "D2OPrecond"}
NETWORKS: dict[str, dict[str, Any]] = {
    "bf16": {**DIGITS, **NCSNPP},
    "fp16": {**DIGITS, "label_dim": 10},
    "fp32": {**DIGITS, "precond": "EDMPrecond", "channel_mult": [1]},
}


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    return CommandLine(tmp_path / "here", capsys, monkeypatch)


def expected_weights(source: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Parameters rounded, buffers not, all in float32."""
    return {
        name: tensor if name.endswith(BUFFERS) else tensor.to(DTYPES[dtype]).float()
        for name, tensor in load_file(source).items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_works_again_everywhere(dtype: str, tmp_path: Path, command: CommandLine) -> None:
    source = checkpoint(tmp_path / "ema.safetensors", **NETWORKS[dtype])
    said, card = exported(source, tmp_path / "net", dtype=dtype)
    file = tmp_path / "net/net.safetensors"
    assert sorted(os.listdir(tmp_path / "net")) == ["README.md", "grid.png", "net.safetensors"]

    stored, expected = load_file(file), expected_weights(source, dtype)
    for name, tensor in stored.items():
        wanted = torch.float32 if name.endswith(BUFFERS) else DTYPES[dtype]
        assert tensor.dtype == wanted and torch.equal(tensor.float(), expected[name]), name
    assert stored.keys() == expected.keys()
    before, after = load_network_file(source), load_network_file(file)
    for key in ("license", "base_model", "base_sha256", "kind", "nimg", "label_dim"):
        assert after.metadata[key] == before.metadata[key], key
    assert after.config == before.config and after.provenance["data"] == {"dataset": "small.zip"}
    made_from = {"file": "ema.safetensors", "sha256": before.sha256, "dtype": dtype}
    assert after.provenance["exported"] == [made_from]
    assert said["sha256"]["net.safetensors"] == after.sha256 and after.sha256 in card

    heun = ["sampler.kind=heun", "sampler.steps=2"] if dtype == "fp32" else []
    common = (f"checkpoint={file}", "device=cpu", *heun)
    assert command("sample", *common, "out=a.npz", "seeds=0-3").code == 0
    assert np.load("a.npz")["arr_0"].shape == (4, 16, 16, 1)
    ended = command(
        "evaluate", *common, "out=p.json", "seeds=0-7", "reference=digits/test", "extractor=pca:2"
    )
    assert ended.code == 0, ended
    assert json.loads(Path("p.json").read_text())["checkpoint"]["sha256"] == after.sha256
    config = cfg.TrainConfig(init=cfg.InitConfig(path=str(file)))
    model = build.generator(config, open_dataset("digits/train"))
    assert all(torch.equal(t, expected[n]) for n, t in model.network.state_dict().items())
    assert all(t.dtype == torch.float32 for t in model.network.state_dict().values())


def test_exported_again_nothing_changes(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "x.safetensors")
    exported(source, tmp_path / "net")
    file = tmp_path / "net/net.safetensors"
    result = result_file(tmp_path / "fid.json", load_network_file(file).sha256)
    again, card = exported(file, tmp_path / "again", metrics=(result,))
    assert again["rounding"] == {"n": 2, "mean": 0.0, "largest": 0, "equal_pixels": 1.0}
    after = load_network_file(tmp_path / "again/again.safetensors")
    made_from = [each["file"] for each in after.provenance["exported"]]
    assert made_from == ["x.safetensors", "net.safetensors"]
    assert "equal pixels 100.00%" in card and "Measured with exactly these weights." in card


@pytest.mark.parametrize(
    ("label_dim", "classes"),
    [(0, [None] * 8), (3, [0, 1, 2, 0, 1, 2, 0, 1]), (20, [0, 2, 5, 7, 10, 12, 15, 17])],
)
def test_the_grid(
    label_dim: int, classes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, sample_fn = [], build.sample_fn
    monkeypatch.setattr(
        build, "sample_fn", lambda *a, **k: asked.append(k["one_class"]) or sample_fn(*a, **k)
    )
    network = live_network({**TINY, "label_dim": label_dim, "img_channels": 3})
    write_grid(network, tmp_path / "grid.png")
    width, height = Image.open(tmp_path / "grid.png").size
    assert height >= 1024 and (width > 1024 if label_dim else width == 1024)
    assert asked == classes


def test_rounding_is_measured(tmp_path: Path) -> None:
    source, cpu = checkpoint(tmp_path / "x.safetensors"), torch.device("cpu")
    said, card = exported(source, tmp_path / "net", images=3)
    files = (source, tmp_path / "net/net.safetensors")
    networks = [build.saved_network(str(file), cpu)[0] for file in files]
    draws = [build.sample_fn(net, cfg.SamplerConfig(), cpu)([0, 1, 2]) for net in networks]
    apart = np.abs(np.subtract(*(d.numpy().astype(int) for d in draws)))
    assert said["rounding"]["mean"] == pytest.approx(apart.mean()) and apart.mean() > 0
    assert said["rounding"]["largest"] == apart.max()
    assert said["rounding"]["equal_pixels"] == pytest.approx((apart.max(1) == 0).mean())
    assert f"mean difference {apart.mean():.4f} of 255, largest {apart.max()}" in card


def test_too_large(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "x.safetensors", model_channels=32)
    out = tmp_path / "net"
    exported(source, tmp_path / "half")
    half = (tmp_path / "half/half.safetensors").stat().st_size / 2**20
    with pytest.raises(UserError, match=r"MiB in fp32.*--dtype bf16 or fp16 would be right"):
        exported(source, out, dtype="fp32", max_mib=half * 1.1)
    with pytest.raises(UserError, match=r"--max-mib 2 with --dtype bf16 would be right"):
        exported(source, out, max_mib=half * 0.9)
    assert not out.exists()
    exported(source, out, max_mib=half * 1.1)
    assert sorted(os.listdir(tmp_path)) == ["half", "net", "x.safetensors"]


@pytest.mark.parametrize("why", [KeyboardInterrupt("^C"), OSError(28, "No space left")])
def test_an_interrupted_write_leaves_nothing(
    why: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object, path: Path) -> None:
        assert os.listdir(path.parent) == ["net.safetensors"]
        raise why

    monkeypatch.setattr(exporting, "write_grid", interrupted)
    source = checkpoint(tmp_path / "x.safetensors")
    with pytest.raises((KeyboardInterrupt, UserError), match=r"\^C|No space left"):
        exported(source, tmp_path / "net")
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ({}, {"name": "../x"}, "name '../x'"),
        ({}, {"name": "a b"}, "name 'a b'"),
        ({}, {"images": 0}, "--images 0"),
        ({}, {"max_mib": float("nan")}, "--max-mib nan"),
        ({"precond": "EDMPrecond"}, {"program": True}, "--program with an EDM denoiser"),
        ({"img_channels": 4}, {}, "images of 4 channels"),
        ({}, {"metrics": ("absent.json",)}, "no such file"),
        ({}, {"dtype": "fp16"}, r"out_norm\.bias has values beyond fp16.*bf16 or fp32"),
    ],
)
def test_what_is_refused(
    network: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "x.safetensors", **network)
    if "dtype" in options:
        file = load_network_file(source)
        file.state["model.out_norm.bias"][0] = 7e4
        save_file(file.state, source, file.metadata)
    with pytest.raises(UserError, match=message):
        exported(source, tmp_path / "net", **options)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_the_tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint(tmp_path / "x.safetensors"), tmp_path / "net"
    arguments = ["export.py", str(source), str(out), "--name", "tiny", "--images", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--note", "See [us](https://example.org)."])
    for code in (0, 1):
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        assert end.value.code == code
    printed = capsys.readouterr()
    assert printed.err == f"error: {out} exists, a new folder would be right\n"
    assert json.loads(printed.out)["sha256"].keys() == {"grid.png", "tiny.safetensors"}
    assert "See [us](https://example.org)." in (out / "README.md").read_text()
