"""Networks, blocks and sampler against arrays of the original code; layouts of the checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.common.errors import UserError
from fastgan.models import network_from_config
from fastgan.models.freeze import frozen_share
from tests.hostile.damage import damaged
from tools.parity import check_file, load_arrays

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(path.name for path in GOLDEN.glob("*.npz"))
LAYOUTS = json.loads((GOLDEN / "edm_checkpoint_layouts.json").read_text())
# Published table: frozen share in % at levels 0-3.
SHARES = {
    "edm-cifar10-32x32-uncond-ve": (0, 84.40, 86.50, 90.46),
    "edm-cifar10-32x32-cond-ve": (0, 84.40, 86.50, 90.46),
    "edm-ffhq-64x64-uncond-ve": (0, 83.84, 85.72, 89.70),
    "edm-afhqv2-64x64-uncond-ve": (0, 83.84, 85.72, 89.70),
    "edm-imagenet-64x64-cond-adm": (0, 78.77, 86.96, 90.17),
}


@pytest.mark.parametrize("name", FILES)
def test_every_golden_file_holds(name: str) -> None:
    verdict = check_file(GOLDEN / name)
    assert verdict["ok"], verdict
    assert len(verdict["errors"]) == len(_comparisons(GOLDEN / name)), verdict["errors"].keys()


def _comparisons(path: Path) -> list[str]:
    """The arrays of a file that are results, told by their names alone."""
    inputs = ("/x", "/sigma", "/labels", "/probe")
    keys = []
    for key in np.load(path).files:
        leaf = key.split("/")[-1]
        result = leaf in ("out", "grad_x", "grad_emb", "logits") or leaf.startswith(("loss", "r1"))
        result |= "grad/" in key or "state_after/" in key or key.startswith(("proj/out", "proj/ch"))
        if result and not key.endswith(inputs):
            keys.append(key)
    return keys


def test_a_wrong_network_fails(tmp_path: Path) -> None:
    """A preconditioning without the eps shift must not pass for D2O's."""
    arrays = dict(np.load(GOLDEN / "ncsnpp_uncond_d2o.npz"))
    config = json.loads(str(arrays["config"])) | {"precond": "EDMPrecond"}
    np.savez(tmp_path / "wrong.npz", **{**arrays, "config": json.dumps(config)})
    assert not check_file(tmp_path / "wrong.npz")["ok"]


def test_nan_fails(tmp_path: Path) -> None:
    arrays = dict(np.load(GOLDEN / "unet_block_adm_two_heads.npz"))
    arrays["state/norm0.bias"] = arrays["state/norm0.bias"] * np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    assert not check_file(tmp_path / "nan.npz")["ok"]


def test_the_command_prints_json_lines_and_fails_on_a_mismatch(tmp_path: Path) -> None:
    arrays = dict(np.load(GOLDEN / "unet_block_adm_two_heads.npz"))
    np.savez(tmp_path / "off.npz", **{**arrays, "out": arrays["out"] + 1e-3})
    good = str(GOLDEN / "unet_block_adm_two_heads.npz")
    command = [sys.executable, "tools/parity.py", good, str(tmp_path / "off.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [v["ok"] for v in verdicts] == [True, False]
    assert verdicts[0]["max_output"] < 1e-5 < verdicts[1]["max_output"]


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04broken"])
def test_the_command_refuses_in_one_line(tmp_path: Path, content: bytes) -> None:
    bad = tmp_path / "bad.npz"
    bad.write_bytes(content)
    command = [sys.executable, "tools/parity.py", str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("packed", [False, True])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, packed: bool) -> None:
    file = tmp_path / "damaged.npz"
    save = np.savez_compressed if packed else np.savez
    save(file, x=np.arange(40.0), config=np.array('{"a": 1}'))
    whole = file.read_bytes()
    hot = [(0, 160), (whole.index(b"PK\1\2"), len(whole))]
    refused = 0
    for case in damaged(whole, seed=11, hot=hot):
        assert isinstance(case.content, bytes)
        file.write_bytes(case.content)
        try:
            load_arrays(file)
        except UserError as error:
            refused += 1
            assert str(file) in str(error) and str(error).isprintable(), case.name
        else:
            assert case.expected != "refused", case.name
    assert refused > 100


@pytest.mark.parametrize(
    ("what", "at", "value"),
    [("compression", 8, 99), ("encryption", 6, 1), ("deflated data", 60, 7)],
)
def test_what_an_archive_may_ask_for_in_vain(
    tmp_path: Path, what: str, at: int, value: int
) -> None:
    """zlib.error, NotImplementedError and RuntimeError, none of them an OSError."""
    file = tmp_path / "odd.npz"
    np.savez_compressed(file, x=np.random.default_rng(0).normal(size=400))
    content = bytearray(file.read_bytes())
    index = content.index(b"PK\1\2")
    content[at] = value
    if what != "deflated data":  # told in the index as well, two bytes further on
        content[index + at + 2] = value
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*odd.npz"):
        load_arrays(file)


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_architectures_have_the_published_names_and_shapes(name: str) -> None:
    config = {"precond": "EDMPrecond", **LAYOUTS[name]["init_kwargs"]}
    with torch.device("meta"):
        network = network_from_config(config)
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == {key: shape for key, (shape, _) in LAYOUTS[name]["state"].items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_frozen_share_equals_the_published_table(name: str) -> None:
    config = {"precond": "EDMPrecond", **LAYOUTS[name]["init_kwargs"]}
    with torch.device("meta"):
        network = network_from_config(config)
    shares = [round(100 * frozen_share(network, level), 2) for level in range(4)]
    assert shares == pytest.approx(SHARES[name], abs=1e-9)
