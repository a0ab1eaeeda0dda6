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
from fastgan.export.card import difference, write_grid
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


def test_the_command_trains_from_it(tmp_path: Path, command: CommandLine) -> None:
    exported(checkpoint(tmp_path / "x.safetensors", **DIGITS), tmp_path / "net")
    ended = command(
        "train", "experiment=demo", "batch=8", "total_images=8", "snapshot=8", "run_dir=run",
        f"init.path={tmp_path / 'net/net.safetensors'}", "optim.decay_from=null",
    )  # fmt: skip
    assert ended.code == 0, ended
    exported(Path("run"), tmp_path / "from-run")
    file = load_network_file(tmp_path / "from-run/from-run.safetensors")
    assert file.metadata["license"] == "CC-BY-NC-SA-4.0"
    assert file.metadata["base_model"] == "net.safetensors"


@pytest.mark.parametrize(
    ("label_dim", "classes"),
    [(0, [None] * 8), (3, [0, 1, 2, 0, 1, 2, 0, 1]), (20, [0, 2, 5, 7, 10, 12, 15, 17])],
)
def test_the_grid(
    label_dim: int, classes: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_difference() -> None:
    first = torch.zeros(2, 3, 1, 2, dtype=torch.uint8)
    second = first.clone()
    second[0, 0, 0, 0], second[0, 1, 0, 0], second[1, 2, 0, 1] = 255, 1, 2
    found = difference(first, second)
    assert (found.n, found.largest, found.equal_pixels) == (2, 255, 0.5)
    assert found.mean == pytest.approx(258 / 12)


def test_rounding_is_measured(tmp_path: Path) -> None:
    source, cpu = checkpoint(tmp_path / "x.safetensors"), torch.device("cpu")
    said, card = exported(source, tmp_path / "net", images=3)
    files = (source, tmp_path / "net/net.safetensors")
    networks = [build.saved_network(str(file), cpu)[0] for file in files]
    draws = [build.sample_fn(net, cfg.SamplerConfig(), cpu)([0, 1, 2]) for net in networks]
    apart = np.abs(np.subtract(*(d.numpy().astype(int) for d in draws)))
    assert said["rounding"]["mean"] == pytest.approx(apart.mean()) and apart.mean() > 0
    assert said["rounding"]["largest"] == apart.max()
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


@pytest.mark.parametrize("what", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(
    what: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def interrupted(_: object, path: Path) -> None:
        seen.extend(os.listdir(path.parent))
        raise what

    monkeypatch.setattr(exporting, "write_grid", interrupted)
    source = checkpoint(tmp_path / "x.safetensors")
    with pytest.raises((KeyboardInterrupt, UserError)) as raised:
        exported(source, tmp_path / "net")
    assert seen == ["net.safetensors"] and os.listdir(tmp_path) == ["x.safetensors"]
    assert isinstance(what, KeyboardInterrupt) or "No space left" in str(raised.value)


def test_what_is_refused(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "x.safetensors"), tmp_path / "net"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "../x"}, "name '../x'"),
        ({"name": "a b"}, "name 'a b'"),
        ({"name": ""}, "name ''"),
        ({"images": 0}, "--images 0"),
        ({"max_mib": float("nan")}, "--max-mib nan"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            exported(source, out, **options)
    edm = checkpoint(tmp_path / "edm.safetensors", precond="EDMPrecond")
    with pytest.raises(UserError, match="--program with an EDM denoiser"):
        exported(edm, out, program=True)
    four = checkpoint(tmp_path / "four.safetensors", img_channels=4)
    with pytest.raises(UserError, match="images of 4 channels"):
        exported(four, out)
    with pytest.raises(UserError, match="does not exist"):
        exported(tmp_path / "absent", out)
    with pytest.raises(UserError, match="exists, a new folder"):
        exported(source, four)
    assert sorted(os.listdir(tmp_path)) == ["edm.safetensors", "four.safetensors", "x.safetensors"]


def test_a_weight_beyond_float16(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x.safetensors")
    file = load_network_file(path)
    name = "model.out_norm.bias"
    file.state[name][0] = 7e4
    save_file(file.state, path, file.metadata)
    with pytest.raises(UserError, match=rf"{name} has values beyond fp16.*bf16 or fp32"):
        exported(path, tmp_path / "net", dtype="fp16")
    exported(path, tmp_path / "net", dtype="bf16")


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
