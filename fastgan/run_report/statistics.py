"""stats.jsonl as curves: broken lines counted, what a resumed run repeated taken once."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median

from fastgan.common.errors import shown
from fastgan.common.files import parse_object

_MOST_NAMES = 100_000


@dataclass
class RunFolder:
    """Reads below `path`; what there is but cannot be read goes into `notes`, a line each."""

    path: Path
    notes: list[str] = field(default_factory=list)

    def read(self, name: str, most: int) -> bytes | None:
        """A file's content, at most `most` bytes; None where it is absent, or noted."""
        file = self.path / name
        if not os.path.lexists(file):
            return None
        try:
            self._check_inside(name)
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

    def names(self, name: str) -> list[str]:
        """What a folder of the run holds, sorted; nothing where it is absent, or noted."""
        if not os.path.lexists(self.path / name):
            return []
        try:
            self._check_inside(name)
            with os.scandir(self.path / name) as entries:
                return sorted(entry.name for entry in islice(entries, _MOST_NAMES))
        except (OSError, ValueError) as error:
            self.note(name, error)
            return []

    def inside(self, name: str) -> bool:
        """Whether the name, with all links followed, still lies in the run directory."""
        return Path(os.path.realpath(self.path / name)).is_relative_to(os.path.realpath(self.path))

    def note(self, name: str, error: Exception) -> None:
        """Says that a file was left out, and why."""
        why = error.strerror if isinstance(error, OSError) else error
        self.notes.append(f"left out: {shown(name)}, {shown(str(why), 200)}")

    def _check_inside(self, name: str) -> None:
        if not self.inside(name):
            raise ValueError("a link out of the run directory")


FILE = "stats.jsonl"
KIMG, SPEED, TIME = "Progress/kimg", "Timing/img_per_sec", "timestamp"
MFU, MEMORY, SKIPPED = "Timing/mfu", "Resources/peak_gpu_mem_gb", "Progress/skipped"
METRIC = "Metric/"
MOST_METRICS = 12
# Ours have some 400 bytes a line and a line per tick.
_MOST_BYTES = 32 << 20
_MOST_LINES = 200_000
_MOST_IN_LINE = 16 << 10
# No statistic of a run, finite or not, comes near; drawing it would overflow.
_LARGEST = 1e30
# Year 9999, the last one that can be printed.
_LAST_TIME = 253_402_300_799.0

Series = tuple[list[float], list[float]]


@dataclass
class Statistics:
    """What stats.jsonl holds, in the order of images; values that are not finite are NaN."""

    records: list[dict[str, float]] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    """Keys of measurements, the first MOST_METRICS that appear."""
    times: list[float] = field(default_factory=list)
    """Seconds since 1970 of every tick, those that were repeated included."""
    broken: int = 0
    """Lines that are no record of a run; a last one that was not finished does not count."""
    repeated: int = 0
    """Records that a run resumed from an earlier checkpoint wrote again."""

    def series(self, key: str) -> Series:
        """Thousands of images and values of all records with this key."""
        found = [(record[KIMG], record[key]) for record in self.records if key in record]
        return [x for x, _ in found], [y for _, y in found]

    def values(self, key: str) -> list[float]:
        """The finite values of a key."""
        return [y for y in self.series(key)[1] if not math.isnan(y)]

    def median(self, key: str) -> float | None:
        return median(values) if (values := self.values(key)) else None

    def best(self, metric: str) -> tuple[float, float] | None:
        """The lowest value of a metric, and the thousands of images it was measured at."""
        pairs = [(y, x) for x, y in zip(*self.series(metric), strict=True) if not math.isnan(y)]
        return min(pairs) if pairs else None

    def measured_at(self, nimg: int) -> dict[str, float]:
        """The finite metrics of the snapshot at `nimg` images."""
        return {
            key: value
            for record in self.records
            if round(record[KIMG] * 1000) == nimg
            for key, value in record.items()
            if key in self.metrics and not math.isnan(value)
        }


def read_statistics(folder: RunFolder) -> Statistics:
    """A run's statistics, empty before the first tick, and where they are too long, with a note."""
    lines = (folder.read(FILE, _MOST_BYTES) or b"").split(b"\n")
    if len(lines) > _MOST_LINES:
        folder.note(FILE, ValueError(f"more than {_MOST_LINES} lines"))
        return Statistics()
    *whole, rest = lines
    found = Statistics()
    _take(found, whole)
    # What follows the last line feed may be a line that is being written.
    broken = found.broken
    _take(found, [rest] if rest else [])
    found.broken = broken
    return found


def _take(found: Statistics, lines: Iterable[bytes]) -> None:
    for line in lines:
        try:
            record = _record(line, found.metrics)
        except ValueError:
            found.broken += 1
            continue
        if TIME in record and 0 < record[TIME] < _LAST_TIME:
            found.times.append(record[TIME])
        found.repeated += _forget_from(found.records, record)
        found.records.append(record)


def _record(line: bytes, metrics: list[str]) -> dict[str, float]:
    """The numbers of a line; ValueError where it does not say at how many images."""
    if len(line) > _MOST_IN_LINE:
        raise ValueError("too long")
    values = parse_object(line)
    record = {key: _number(value) for key, value in values.items() if _wanted(key, metrics)}
    if not 0 <= record.get(KIMG, math.nan) < 1e15:
        raise ValueError("no number of images")
    if record.get(MEMORY) == 0:  # the CPU's, which is not counted
        del record[MEMORY]
    return record


def _wanted(key: str, metrics: list[str]) -> bool:
    if not key.startswith(METRIC):
        return key.startswith(("Loss/", "Progress/", "Timing/", "Resources/")) or key == TIME
    if key not in metrics and len(metrics) < MOST_METRICS:
        metrics.append(key)
    return key in metrics


def _number(value: object) -> float:
    """NaN for null and whatever else is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if abs(number) < _LARGEST else math.nan


def _forget_from(records: list[dict[str, float]], new: dict[str, float]) -> int:
    """Drops what a resumed run repeats; a measurement follows the tick at the same images."""
    before, tick = len(records), TIME in new
    while records and (records[-1][KIMG] > new[KIMG] or (tick and records[-1][KIMG] == new[KIMG])):
        records.pop()
    return before - len(records)
