"""What a run directory holds, read with care: nothing in it is trusted."""

import base64
import math
import os
import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fastgan.checkpoint.store import EMA, META
from fastgan.common.errors import UserError, shown
from fastgan.common.files import parse_object
from fastgan.common.run_state import STATE, RunState, read_state
from fastgan.data.decode import open_image
from fastgan.launch import checks
from fastgan.launch.run_dir import CONFIG, read_config
from fastgan.run_report.statistics import FILE, KIMG, Statistics, parse_statistics

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
_MOST_CONFIG, _MOST_META, _MOST_TEXT, _MOST_NAMES = 32 << 10, 1 << 20, 32 << 20, 100_000
_MOST_PNG, _MOST_PIXELS = 4 << 20, 1 << 24


@dataclass
class RunFolder:
    """Reads below `path`; what there is but cannot be read goes into `notes`, a line each."""

    path: Path
    notes: list[str] = field(default_factory=list)

    def read(self, name: str, most: int) -> bytes | None:
        """A file's content, at most `most` bytes; None where it is absent, or noted."""
        file = self.path / name
        try:
            if not self._is_there(name):
                return None
            if not file.is_file():  # a pipe would keep us waiting
                raise ValueError("no file")
            with file.open("rb") as opened:
                content = opened.read(most + 1)
            if len(content) > most:
                raise ValueError(f"more than {most} bytes")
        except (OSError, ValueError) as error:
            self.note(name, error)
            return None
        return content

    def names(self, name: str, pattern: str) -> list[str]:
        """What a folder of the run holds and `pattern` allows, sorted; nothing where it is absent,
        or noted."""
        try:
            if not self._is_there(name):
                return []
            with os.scandir(self.path / name) as entries:
                found = sorted(entry.name for entry in islice(entries, _MOST_NAMES))
        except (OSError, ValueError) as error:
            self.note(name, error)
            return []
        return [each for each in found if re.fullmatch(pattern, each)]

    def inside(self, name: str) -> bool:
        """Whether the name, with all links followed, still lies in the run directory."""
        return Path(os.path.realpath(self.path / name)).is_relative_to(os.path.realpath(self.path))

    def note(self, name: str, error: Exception) -> None:
        """Says that a file was left out, and why."""
        why = error.strerror if isinstance(error, OSError) else error
        self.notes.append(f"left out: {shown(name)}, {shown(str(why), 200)}")

    def _is_there(self, name: str) -> bool:
        if os.path.lexists(self.path / name) and not self.inside(name):
            raise ValueError("a link out of the run directory")
        return os.path.lexists(self.path / name)


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
    folder, state, statistics = RunFolder(path), None, Statistics()
    if not os.path.isfile(path / CONFIG) or not folder.inside(CONFIG):
        raise UserError(f"no such run, {path}, a folder with a {CONFIG} in it would be right")
    config = read_config(path / CONFIG)
    text = (folder.read(CONFIG, _MOST_CONFIG) or b"").decode(errors="replace")
    try:
        if not folder.inside(STATE):
            raise UserError("a link out of the run directory")
        state = read_state(path)
    except UserError as error:
        folder.note(STATE, error)
    try:
        statistics = parse_statistics(folder.read(FILE, _MOST_TEXT) or b"")
    except ValueError as error:
        folder.note(FILE, error)
    log = (folder.read(LOG, _MOST_TEXT) or b"").decode(errors="replace")
    warned = [line for line in log.split("\n") if line.startswith(WARNINGS)]
    warnings = [shown(line, 400) for line in warned[-MOST_WARNINGS:]]
    names = folder.names("checkpoints", "[0-9]{1,19}")[-MOST_CHECKPOINTS:]
    saved = [each for name in names if (each := _checkpoint(folder, f"checkpoints/{name}/{META}"))]
    if statistics.broken:
        folder.notes.append(f"left out: broken lines of {FILE}, {statistics.broken} of them")
    if statistics.repeated:
        folder.notes.append(
            f"{statistics.repeated} lines of {FILE} were written again after a resumption; "
            "the later ones count"
        )
    return Run(folder, config, text, state, statistics, warnings, len(warned), saved)


def sample_numbers(folder: RunFolder, most: int = 6) -> list[int]:
    """Images trained at the first grid, the last one, and evenly spaced ones in between."""
    found = [int(name[:10]) for name in folder.names("samples", r"[0-9]{10}\.png")]
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


def _checkpoint(folder: RunFolder, name: str) -> SavedCheckpoint | None:
    """None where there is no such file, or, with a note, one that is damaged."""
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
