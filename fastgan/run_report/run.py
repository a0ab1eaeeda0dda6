"""What a run directory holds, read with care: nothing in it is trusted."""

import base64
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgan.checkpoint.store import EMA, META
from fastgan.common.errors import UserError, shown
from fastgan.common.files import parse_object
from fastgan.common.run_state import STATE, RunState, read_state
from fastgan.data.decode import open_image
from fastgan.launch import checks
from fastgan.launch.run_dir import CONFIG, read_config
from fastgan.run_report.statistics import FILE, KIMG, RunFolder, Statistics, read_statistics

LOG = "log.txt"
MOST_WARNINGS = 100
MOST_CHECKPOINTS = 100
# How the training loop begins the lines that say something went wrong (training/loop.py,
# resume.py, health.py).
WARNINGS = (
    "warning:",
    "left out",
    "before: ",
    "the process before this one",
    "how the run ended before",
)
_MOST_CONFIG, _MOST_META, _MOST_LOG = 32 << 10, 1 << 20, 32 << 20
_MOST_PNG, _MOST_PIXELS = 4 << 20, 1 << 24


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a meta.json says; `sha256` of ema.safetensors."""

    nimg: int
    metrics: dict[str, float]
    sha256: str

    @property
    def score(self) -> float:
        """The lowest number, by which training keeps the best checkpoint."""
        return min(self.metrics.values(), default=math.inf)


@dataclass(frozen=True)
class Run:
    """A run as its directory tells it; `warnings`: the last of `warned` lines of its log."""

    folder: RunFolder
    config: dict[str, Any]
    config_text: str
    state: RunState | None
    statistics: Statistics
    warnings: list[str]
    warned: int
    checkpoints: list[SavedCheckpoint]

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def experiment(self) -> str:
        return shown(self.config.get("experiment_name", "custom"))

    @property
    def pretraining(self) -> bool:
        """Whether it is EDM pre-training, which has no discriminator."""
        return "discriminator" not in self.config

    @property
    def nimg(self) -> int:
        """Images trained: what state.json says, else the statistics."""
        if self.state is not None:
            return self.state.nimg
        records = self.statistics.records
        return round(records[-1][KIMG] * 1000) if records else 0

    @property
    def total_images(self) -> int | None:
        try:
            return checks.images(self.config.get("total_images"), "total_images")
        except (UserError, ValueError):
            return None


def read_run(path: Path) -> Run:
    """UserError: no run, or a config.yaml that is damaged."""
    folder = RunFolder(path)
    if not os.path.isfile(path / CONFIG) or not folder.inside(CONFIG):
        raise UserError(f"no such run, {path}, a folder with a {CONFIG} in it would be right")
    config = read_config(path / CONFIG)
    text = (folder.read(CONFIG, _MOST_CONFIG) or b"").decode(errors="replace")
    state, statistics = _state(folder), read_statistics(folder)
    warnings, warned = _warnings(folder)
    run = Run(folder, config, text, state, statistics, warnings, warned, _checkpoints(folder))
    if statistics.broken:
        folder.notes.append(f"left out: broken lines of {FILE}, {statistics.broken} of them")
    if statistics.repeated:
        folder.notes.append(
            f"{statistics.repeated} lines of {FILE} were written again after a resumption; "
            "the later ones count"
        )
    return run


def sample_numbers(folder: RunFolder, most: int = 6) -> list[int]:
    """Images trained at the first grid, the last one, and evenly spaced ones in between."""
    found = [
        int(m[1]) for n in folder.names("samples") if (m := re.fullmatch(r"([0-9]{10})\.png", n))
    ]
    last = len(found) - 1
    if last < most:
        return found
    return [found[round(i * last / (most - 1))] for i in range(most)]


def sample_uri(folder: RunFolder, nimg: int) -> str | None:
    """A grid as a data: address; None, and a note, where it is no sound PNG of some size."""
    name = f"samples/{nimg:010d}.png"
    content = folder.read(name, _MOST_PNG)
    if content is None:
        return None
    try:
        image = open_image(content, name)
        if image.format != "PNG" or image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"no PNG of at most {_MOST_PIXELS} pixels")
        image.verify()
    except Exception as error:  # decoders raise nearly anything on broken bytes
        folder.note(name, error)
        return None
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _state(folder: RunFolder) -> RunState | None:
    try:
        if not folder.inside(STATE):
            raise UserError("a link out of the run directory")
        return read_state(folder.path)
    except UserError as error:
        folder.note(STATE, error)
        return None


def _warnings(folder: RunFolder) -> tuple[list[str], int]:
    """The last warnings of the log, shortened, and how many there are."""
    text = (folder.read(LOG, _MOST_LOG) or b"").decode(errors="replace")
    found = [line for line in text.split("\n") if line.startswith(WARNINGS)]
    return [shown(line, 400) for line in found[-MOST_WARNINGS:]], len(found)


def _checkpoints(folder: RunFolder) -> list[SavedCheckpoint]:
    names = [n for n in folder.names("checkpoints") if re.fullmatch(r"[0-9]{1,19}", n)]
    found = (
        _checkpoint(folder, f"checkpoints/{name}/{META}") for name in names[-MOST_CHECKPOINTS:]
    )
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _checkpoint(folder: RunFolder, name: str) -> SavedCheckpoint | None:
    content = folder.read(name, _MOST_META)
    if content is None:
        return None
    try:
        facts = parse_object(content)
        nimg, metrics, digest = facts["nimg"], facts["metrics"], facts["sha256"][EMA]
        if type(nimg) is not int or not 0 <= nimg < 2**63:
            raise ValueError("nimg is no number of images")
        if type(digest) is not str or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError("no sha256")
        values = {str(key): float(value) for key, value in metrics.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        folder.note(name, ValueError(f"damaged: {shown(error)}"))
        return None
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    return SavedCheckpoint(nimg, finite, digest)
