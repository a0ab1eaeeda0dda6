"""Everything against arrays of the original code; layouts of the published checkpoints."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgan.common.errors import UserError
from fastgan.models import network_from_config
from fastgan.models.freeze import frozen_share
from tests.conftest import GOLDEN
from tests.hostile.damage import damaged
from tools.parity import check_file, load_arrays

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
BLOCK, SONG = "unet_block_adm_two_heads.npz", "ncsnpp_uncond_d2o.npz"
HEAD, COND = "projected_discriminator_toy.npz", "projected_discriminator_cond.npz"
Arrays = dict[str, np.ndarray]


@pytest.mark.parametrize("name", FILES)
def test_every_golden_file_holds(name: str) -> None:
    before = torch.get_rng_state()
    verdict = check_file(GOLDEN / name)
    assert verdict["ok"], verdict
    assert verdict["errors"].keys() == _results(GOLDEN / name)
    assert torch.equal(before, torch.get_rng_state())


def _results(path: Path) -> set[str]:
    """The arrays of a file that are results, told by their names alone."""
    leaves = ("out", "grad_x", "grad_emb", "logits")
    parts = ("grad/", "state_after/", "proj/out", "proj/ch", "disc/loss", "disc/r1")
    return {
        key
        for key in np.load(path).files
        if key.split("/")[-1] in leaves or any(part in f"{key}/" for part in parts)
    }


def changed(name: str, change: Callable[[Arrays], object], folder: Path) -> dict[str, Any]:
    """The verdict on a golden file that `change` makes wrong."""
    arrays = load_arrays(GOLDEN / name)
    change(arrays)
    np.savez(folder / "changed.npz", **arrays)  # type: ignore[arg-type]
    return check_file(folder / "changed.npz")


def moved(key: str) -> Callable[[Arrays], object]:
    dice = np.random.default_rng(0)
    return lambda a: a.update({key: a[key] + 1e-3 * dice.normal(size=a[key].shape)})


def preconditioned_as_edm(arrays: Arrays) -> None:
    """Without the eps shift, which must not pass for D2O's."""
    config = json.loads(str(arrays["config"])) | {"precond": "EDMPrecond"}
    arrays["config"] = np.array(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "change", "wrong"),
    [
        (SONG, preconditioned_as_edm, "mid/out"),
        (BLOCK, lambda a: a.update({"state/norm0.bias": a["state/norm0.bias"] * np.nan}), "out"),
        (BLOCK, lambda a: a.update(out=a["out"][:, 1:]), "out"),
        (HEAD, moved("proj/state/layer3_csm.out_conv.weight"), "proj/out0"),
        (HEAD, moved("disc/state/main.0.main.1.weight"), "disc/r1_penalty_wrt_x"),
        (
            HEAD,
            moved("disc/state/main.0.main.1.running_mean"),
            "disc/state_after/main.0.main.1.running_mean",
        ),
        (COND, moved("disc/embed_rows_3_7_0"), "disc/logits"),
        (COND, moved("disc/state/embed_proj.bias"), "disc/loss_ns_fake"),
    ],
)
def test_what_is_wrong_fails(name: str, change: Any, wrong: str, tmp_path: Path) -> None:
    verdict = changed(name, change, tmp_path)
    error = verdict["errors"][wrong]
    assert not verdict["ok"] and (error is None or error > 1e-9)
    assert (error is None) == (verdict["max_output"] is None)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        (HEAD, "proj/state/layer0_ccm.weight"),
        (HEAD, "proj/out2"),
        (HEAD, "disc/state/main.1.weight_orig"),
        (BLOCK, "probe"),
        (SONG, "hi/sigma"),
        (SONG, "state/model.map_layer0.bias"),
        ("heun_sampler_ddpmpp_cond.npz", "network"),
    ],
)
def test_a_missing_array_is_a_user_error(name: str, missing: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"changed\.npz .*expected"):
        changed(name, lambda a: a.pop(missing), tmp_path)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON lines and 1 on a mismatch; one line for what cannot be read."""
    changed(BLOCK, lambda a: a.update(out=a["out"] + 1e-3), tmp_path)
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK\x03\x04broken")

    def parity(*files: Path) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["parity.py", *map(str, files)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(GOLDEN.parents[1] / "tools/parity.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    assert parity(GOLDEN / BLOCK)[0] == 0
    code, out, _ = parity(GOLDEN / BLOCK, tmp_path / "changed.npz")
    verdicts = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [v["ok"] for v in verdicts] == [True, False]
    assert verdicts[0]["max_output"] < 1e-5 < verdicts[1]["max_output"]
    code, out, error = parity(bad)
    assert (code, out) == (1, "") and error.startswith("error: ") and error.count("\n") == 1


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


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_architectures(name: str) -> None:
    """Their names, shapes and frozen shares."""
    with torch.device("meta"):
        network = network_from_config({"precond": "EDMPrecond", **LAYOUTS[name]["init_kwargs"]})
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == {key: shape for key, (shape, _) in LAYOUTS[name]["state"].items()}
    shares = [round(100 * frozen_share(network, level), 2) for level in range(4)]
    assert shares == pytest.approx(SHARES[name], abs=1e-9)
