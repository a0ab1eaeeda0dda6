"""Checkpoints to export, small and alive."""

import json
from pathlib import Path
from typing import Any

from fastgan.checkpoint.network_file import save_network
from fastgan.export.command import Options, export
from tests.conftest import TINY, live_network

NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "attn_resolutions": [4],
}
RESULT: dict[str, Any] = {
    "metric": "FD-R56",
    "value": 1.25,
    "n": 40,
    "seeds": "0-39",
    "sampler": {"kind": "few_step", "steps": 1},
    "extractor": {"name": "resnet56", "weights_sha256": "ab" * 32},
    "reference": {"dataset": {"dataset": "small.zip", "fingerprint": "cd" * 32}, "n": 50},
    "checkpoint": {"file": "somewhere/ema.safetensors", "sha256": "ef" * 32},
}


def checkpoint(path: Path, provenance: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A network file; by default a one-step generator of grey 8 x 8 images, EDM's licence."""
    config = {**TINY, **changes}
    origin = provenance or {
        "base_model": "edm-base",
        "base_sha256": "12" * 32,
        "license": "CC-BY-NC-SA-4.0",
        "data": {"dataset": "small.zip"},
    }
    state = live_network(config).state_dict()
    save_network(path, config, state, kind="ema", nimg=12_000, provenance=origin)
    return path


def exported(source: Path, out: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """What the command returns, and the card."""
    said = export(str(source), out, Options(**{"images": 2, **options}))
    return said, (out / "README.md").read_text()


def result_file(path: Path, sha256: str, **changes: Any) -> str:
    """A result of fastgan.evaluate for the file with this sha256."""
    content = {**RESULT, "checkpoint": {"file": "x.safetensors", "sha256": sha256}} | changes
    path.write_text(json.dumps(content))
    return str(path)
