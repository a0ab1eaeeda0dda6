"""Runs the commands in this process, as `python -m fastgan.NAME key=value ...` would."""

import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastgan import config as cfg
from fastgan.checkpoint.network_file import save_network
from fastgan.evaluate import evaluate
from fastgan.launch.cli import hydra_command
from fastgan.pretrain import pretrain
from fastgan.sample import sample
from fastgan.train import train
from tests.conftest import TINY, live_network

COMMANDS = {
    "train": (cfg.TrainConfig, train),
    "pretrain": (cfg.PretrainConfig, pretrain),
    "sample": (cfg.SampleConfig, sample),
    "evaluate": (cfg.EvaluateConfig, evaluate),
}


@dataclass
class Ended:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        lines = self.err.splitlines()
        assert self.code == 1 and len(lines) == 1 and lines[0].startswith("error: "), self
        return lines[0]


class CommandLine:
    """Calls commands from an empty working directory."""

    def __init__(
        self, folder: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
    ) -> None:
        self.folder, self.capsys, self.patch = folder, capsys, patch
        folder.mkdir()
        patch.chdir(folder)
        # hydra_command sets it for the whole process.
        patch.setenv("HYDRA_FULL_ERROR", "1")

    def __call__(self, name: str, *overrides: str) -> Ended:
        self.capsys.readouterr()
        self.patch.setattr("sys.argv", [f"{name}.py", *overrides])
        with pytest.raises(SystemExit) as end:
            hydra_command(name, *COMMANDS[name])
        out, err = self.capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, out, err)

    def files(self) -> list[str]:
        """What the commands left in the working directory."""
        return sorted(os.listdir(self.folder))


def network_file(path: Path, **changes: Any) -> Path:
    """A network file of the tiny ADM UNet; by default for the digits, unconditional."""
    config = {**TINY, "img_resolution": 16, "precond": "EDMPrecond"} | changes
    state = live_network(config).state_dict()
    save_network(path, config, state, kind="generator", provenance={"license": "test-licence"})
    return path


def dataset_zip(path: Path, resolution: int, classes: list[int] | None) -> Path:
    """An EDM zip of eight noisy RGB images."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, resolution, resolution, 3), np.uint8)
    names = [f"00000/img{i:08d}.png" for i in range(8)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(names, pixels, strict=True):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            archive.writestr(name, file.getvalue())
        labels = None if classes is None else [[n, c] for n, c in zip(names, classes, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path
