"""The card: its numbers with all that belongs to them, and strangers' texts as mere letters."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastgan.checkpoint.network_file import load_network_file
from fastgan.common.errors import UserError
from fastgan.export.card import LICENSES
from fastgan.export.command import read_result
from fastgan.models import network_from_config
from tests.conftest import TINY
from tests.export.exporting import checkpoint, exported, result_file

EVIL = (
    "`](http://evil.example) <script>alert(1)</script> ![x](http://evil.example/x.png)\n\n"
    "# evil | evil \x1b[31m www.evil.example me@evil.example \u202e \\` " + "x" * 5000
)


def sections(card: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", card, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "ema.safetensors")


def test_what_a_card_says(source: Path, tmp_path: Path) -> None:
    file = load_network_file(source)
    result = result_file(tmp_path / "fid.json", file.sha256)
    _, card = exported(source, tmp_path / "net", metrics=(result,), note="Words of *mine*.")
    told = sections(card)
    parameters = sum(p.numel() for p in network_from_config(TINY).parameters())
    assert told[""].startswith("# net\n\nA one-step generator of grey images of 8 x 8 pixels, ")
    assert f"{parameters:,} parameters" in told[""] and "Words of *mine*." in told[""]
    assert "no commercial use" in told["Licence"] and "CC BY-NC-SA 4.0" in told["Licence"]
    about = told["What it is"]
    assert "| images seen in training | 12,000 |" in about
    assert f"| trained from | `edm-base`, sha256 `{'12' * 32}` |" in about
    assert f"| exported from | `ema.safetensors`, sha256 `{file.sha256}` |" in about
    assert "| `precond` | `D2OPrecond` |" in about and "| `channel_mult` | `1 2` |" in about
    [row] = [line for line in told["Numbers"].splitlines() if "FD-R56" in line]
    for part in ("| 1.25 |", "`40`", "`0-39`", "kind few_step, steps 1", "name resnet56",
                 f"weights_sha256 {'ab' * 32}", "dataset.dataset small.zip", "n 50",
                 f"dataset.fingerprint {'cd' * 32}"):  # fmt: skip
        assert part in row, part
    assert "before rounding, `ema.safetensors`" in told["Numbers"]
    assert "torch" in told["Made with"] and "What bf16 changes" in told
    assert "sampler.kind" not in told["How to use it"]


def test_a_denoiser_and_unknown_licences(tmp_path: Path) -> None:
    edm = checkpoint(tmp_path / "edm.safetensors", {"license": "My own"}, precond="EDMPrecond",
                     channel_mult=[1])  # fmt: skip
    _, card = exported(edm, tmp_path / "net", images=1, dtype="fp32")
    told = sections(card)
    assert "An EDM diffusion denoiser" in told[""] and "18 steps of Heun's sampler" in told[""]
    assert "sampler.kind=heun sampler.steps=18" in told["How to use it"]
    assert "`My own`" in told["Licence"] and "| trained from | random weights |" in card
    assert "None were given." in told["Numbers"]


def test_a_licence_for_what_has_none(source: Path, tmp_path: Path) -> None:
    ours = checkpoint(tmp_path / "ours.safetensors", {"data": {"dataset": "small.zip"}})
    _, card = exported(ours, tmp_path / "a", license="Apache-2.0")
    assert LICENSES["Apache-2.0"] in card
    file = load_network_file(tmp_path / "a/a.safetensors")
    assert file.metadata["license"] == "Apache-2.0" == file.provenance["license"]
    with pytest.raises(UserError, match=r"'CC-BY-NC-SA-4\.0': that licence stays"):
        exported(source, tmp_path / "b", license="Apache-2.0")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": {"file": "b.safetensors", "sha256": "0" * 64}}, "measured with b.safetens"),
        ({"checkpoint": {"file": "b.safetensors"}}, "measured with"),
        ({"checkpoint": None}, "checkpoint=a NoneType"),
        ({"n": None}, "n=a NoneType"),
        ({"n": True}, "n=True"),
        ({"value": float("nan")}, "value=nan, .*a finite number"),
        ({"value": 10**400}, "value=a huge integer"),
        ({"reference": "x"}, "reference=x"),
        ("[]", "a result of fastgan"),
        (" " * 2_000_000 + "{}", "a result of fastgan"),
        ("[" * 9999, "a result of fastgan"),
    ],
)
def test_results_that_do_not_belong(
    change: dict[str, Any] | str, message: str, source: Path, tmp_path: Path
) -> None:
    path, file = tmp_path / "fid.json", load_network_file(source)
    right = json.loads(Path(result_file(path, file.sha256)).read_text())
    assert read_result(path, file) == right
    path.write_text(change if isinstance(change, str) else json.dumps({**right, **change}))
    with pytest.raises(UserError, match=message):
        read_result(path, file)


def test_texts_of_strangers_are_letters(tmp_path: Path) -> None:
    origin = {"base_model": EVIL, "base_sha256": EVIL, "license": EVIL, EVIL: {EVIL: [EVIL] * 100}}
    source = checkpoint(tmp_path / "x.safetensors", origin)
    evil = {"metric": EVIL, "seeds": EVIL, "extractor": {EVIL: EVIL}, "reference": {"a": [EVIL]}}
    result = result_file(tmp_path / "f.json", load_network_file(source).sha256, **evil)
    _, card = exported(source, tmp_path / "net", metrics=(result,))
    assert len(card) < 30_000 and "\x1b" not in card and "\u202e" not in card
    assert card.count("evil") > 10
    bare = re.sub(r"`[^`\n]*`", "CODE", re.sub(r"```.*?```", "", card, flags=re.DOTALL))
    for forbidden in ("evil", "<", "`", "script", "@"):
        assert forbidden not in bare, forbidden
    for text in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        assert len({line.count("|") for line in text.splitlines()}) == 1  # as many cells everywhere
    assert bare.count("\n# ") == 0
