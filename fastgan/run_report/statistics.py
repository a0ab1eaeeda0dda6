"""stats.jsonl as curves: broken lines counted, what a resumed run repeated taken once."""

import math
from dataclasses import dataclass, field
from statistics import median

from fastgan.common.files import parse_object

FILE = "stats.jsonl"
KIMG, SPEED, TIME = "Progress/kimg", "Timing/img_per_sec", "timestamp"
MFU, MEMORY, SKIPPED = "Timing/mfu", "Resources/peak_gpu_mem_gb", "Progress/skipped"
METRIC = "Metric/"
MOST_METRICS = 12
_GROUPS = ("Loss/", "Progress/", "Timing/", "Resources/")
# Ours have some 400 bytes a line and a line per tick.
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
        return min(pairs, default=None)

    def measured_at(self, nimg: int) -> dict[str, float]:
        """The finite metrics of the snapshot at `nimg` images."""
        return {
            key: value
            for record in self.records
            if round(record[KIMG] * 1000) == nimg
            for key, value in record.items()
            if key in self.metrics and not math.isnan(value)
        }

    def add(self, record: dict[str, float]) -> None:
        """Appends it; it takes the place of what a resumed run repeats.

        A measurement follows the tick at as many images.
        """
        kimg, tick = record[KIMG], TIME in record
        while self.records and (
            self.records[-1][KIMG] > kimg or (tick and self.records[-1][KIMG] == kimg)
        ):
            self.records.pop()
        self.records.append(record)


def parse_statistics(content: bytes) -> Statistics:
    """The statistics of a run in a file's bytes. ValueError: too many lines to be one's."""
    found, lines = Statistics(), content.split(b"\n")
    if len(lines) > _MOST_LINES:
        raise ValueError(f"more than {_MOST_LINES} lines")
    for number, line in enumerate(lines, 1):
        try:
            record = _record(line, found.metrics)
        except ValueError:
            # What follows the last line feed may be a line that is being written.
            found.broken += number < len(lines)
            continue
        if 0 < record.get(TIME, 0) < _LAST_TIME:
            found.times.append(record[TIME])
        found.add(record)
    return found


def _record(line: bytes, metrics: list[str]) -> dict[str, float]:
    """The numbers of a line; ValueError where it does not say at how many images."""
    if len(line) > _MOST_IN_LINE:
        raise ValueError("too long")
    values = parse_object(line)
    new = [key for key in values if key.startswith(METRIC) and key not in metrics]
    metrics += new[: MOST_METRICS - len(metrics)]
    record = {
        key: _number(value)
        for key, value in values.items()
        if key in metrics or key == TIME or key.startswith(_GROUPS)
    }
    if not 0 <= record.get(KIMG, math.nan) < 1e15:
        raise ValueError("no number of images")
    if record.get(MEMORY) == 0:  # the CPU's, which is not counted
        del record[MEMORY]
    return record


def _number(value: object) -> float:
    """NaN for null and whatever else is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < _LARGEST else math.nan
