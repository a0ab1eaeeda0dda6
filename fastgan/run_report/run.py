"""What a run directory holds, read with care: nothing in it is trusted."""

import base64
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fastgan.checkpoint.store import EMA, META
from fastgan.common.errors import UserError, shown
from fastgan.common.files import parse_object
from fastgan.common.run_state import STATE, RunState, read_state
from fastgan.data.decode import open_image
from fastgan.launch import checks
from fastgan.launch.run_dir import CONFIG, read_config
from fastgan.run_report.statistics import FILE, KIMG, Statistics, parse_statistics

T = TypeVar("T")
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

    def read(self, name: str, most: int, parse: Callable[[bytes], T]) -> T | None:
        """What `parse` makes of a file of at most `most` bytes; None where absent, or noted."""

        def parsed(path: Path) -> T:
            if not path.is_file():  # a pipe would keep us waiting
                raise ValueError("no file")
            with path.open("rb") as file:
                content = file.read(most + 1)
            if len(content) > most:
                raise ValueError(f"more than {most} bytes")
            return parse(content)

        return self.noted(name, parsed)

    def names(self, name: str, pattern: str) -> list[str]:
        """What a folder holds and `pattern` allows, sorted; [] where it is absent, or noted."""

        def listed(path: Path) -> list[str]:
            with os.scandir(path) as entries:
                found = sorted(entry.name for entry in islice(entries, _MOST_NAMES))
            return [each for each in found if re.fullmatch(pattern, each)]

        return self.noted(name, listed) or []

    def inside(self, name: str) -> bool:
        """Whether the name, with all links followed, still lies in the run directory."""
        return Path(os.path.realpath(self.path / name)).is_relative_to(os.path.realpath(self.path))

    def noted(self, name: str, get: Callable[[Path], T]) -> T | None:
        """What `get` makes of a path in the run; None where absent, or with a note why not."""
        try:
            if not os.path.lexists(self.path / name):
                return None
            if not self.inside(name):
                raise ValueError("a link out of the run directory")
            return get(self.path / name)
        except Exception as error:  # decoders raise nearly anything on broken bytes
            why = getattr(error, "strerror", None) or error
            self.notes.append(f"left out: {shown(name)}, {shown(str(why), 200)}")
            return None


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a meta.json says; `sha256` of ema.safetensors."""

    nimg: int
    metrics: dict[str, float]
    sha256: str


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
    def experiment(self) -> str:
        return shown(self.config.get("experiment_name", "custom"))

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
    text = folder.read(CONFIG, _MOST_CONFIG, _text) or ""
    state = folder.noted(STATE, lambda file: read_state(file.parent))
    statistics = folder.read(FILE, _MOST_TEXT, parse_statistics) or Statistics()
    if statistics.broken:
        folder.notes.append(f"left out: broken lines of {FILE}, {statistics.broken} of them")
    log = folder.read(LOG, _MOST_TEXT, _text) or ""
    warned = [line for line in log.split("\n") if line.startswith(WARNINGS)]
    warnings = [shown(line, 400) for line in warned[-MOST_WARNINGS:]]
    names = folder.names("checkpoints", "[0-9]{1,19}")[-MOST_CHECKPOINTS:]
    found = (folder.read(f"checkpoints/{name}/{META}", _MOST_META, _checkpoint) for name in names)
    saved = [each for each in found if each]
    return Run(folder, config, text, state, statistics, warnings, len(warned), saved)


def samples(folder: RunFolder, most: int = 6) -> list[tuple[int, str]]:
    """Images trained and data: address of the first grid, the last, and evenly spaced ones.

    What is no sound PNG of some size is left out, with a note.
    """
    names = folder.names("samples", r"[0-9]{10}\.png")
    last = len(names) - 1
    if last >= most:
        names = [names[round(i * last / (most - 1))] for i in range(most)]
    found = ((int(name[:10]), folder.read(f"samples/{name}", _MOST_PNG, _uri)) for name in names)
    return [(nimg, uri) for nimg, uri in found if uri]


def _uri(content: bytes) -> str:
    image = open_image(content, "the grid")
    if image.format != "PNG" or image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"no PNG of at most {_MOST_PIXELS} pixels")
    image.verify()
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


def _checkpoint(content: bytes) -> SavedCheckpoint:
    facts = parse_object(content)
    try:
        nimg, metrics, digest = facts["nimg"], facts["metrics"], facts["sha256"][EMA]
        values = {str(key): float(value) for key, value in metrics.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"damaged: {error!r}") from error
    if type(nimg) is not int or not 0 <= nimg < 2**63:
        raise ValueError("nimg is no number of images")
    if type(digest) is not str or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("no sha256")
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    return SavedCheckpoint(nimg, finite, digest)
