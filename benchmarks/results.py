"""Measured rows, from the JSON that pytest-benchmark writes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgan.common.errors import UserError

Key = tuple[str, str, str]
# Of the machine these say enough; the rest (its name, its CPU's flags) is not for publication.
KEPT = ("benchmarks", "chip", "commit_info", "datetime", "device", "failed", "launch", "software")


@dataclass(frozen=True)
class Row:
    """The median of one candidate in one direction, in seconds per call."""

    op: str
    network: str
    shape: str
    direction: str
    candidate: str
    seconds: float
    floor: float
    rounds: int
    count: int
    channels: int
    pixels: int
    kept_bytes: int | None

    @property
    def key(self) -> Key:
        """What is the same for all candidates."""
        return self.network, self.shape, self.direction

    @property
    def share(self) -> float:
        """Of the floor: 1 is as fast as the chip can be."""
        return self.floor / self.seconds


@dataclass(frozen=True)
class Results:
    """One or several runs on one kind of machine."""

    rows: list[Row]
    failed: list[dict[str, str]]
    document: dict[str, Any]

    @property
    def on_gpu(self) -> bool:
        return self.document["device"] == "cuda"

    @property
    def machine(self) -> str:
        return self.document["chip"]["name"]

    @property
    def date(self) -> str:
        return self.document["datetime"][:10]

    def of(self, op: str) -> "Results":
        """The part that is about one op."""
        document = self.document | {
            "benchmarks": [b for b in self.document["benchmarks"] if b["extra_info"]["op"] == op],
            "failed": [case for case in self.failed if case["op"] == op],
        }
        return _results(document)


def load(files: Sequence[str | Path]) -> Results:
    """The runs of all `files` as one. UserError: not such a file, two machines, a case twice."""
    documents = [_document(Path(file)) for file in files]
    first = documents[0]
    for file, other in zip(files, documents, strict=True):
        for key in ("device", "launch", "software"):
            if other[key] != first[key]:
                raise UserError(
                    f"{key} is {other[key]}, {file}, {first[key]} as in {files[0]} would do"
                )
        if other["chip"]["name"] != first["chip"]["name"]:
            raise UserError(
                f"measured on {other['chip']['name']}, {file}, "
                f"{first['chip']['name']} as in {files[0]} would do"
            )
    merged = first | {
        "benchmarks": [b for document in documents for b in document["benchmarks"]],
        "failed": [case for document in documents for case in document["failed"]],
        "datetime": max(document["datetime"] for document in documents),
    }
    return _results(merged)


def _document(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        return {key: content[key] for key in KEPT}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"cannot be read ({reason}), {path}, a file that "
            "`pytest benchmarks --benchmark-json=FILE` wrote would do"
        ) from error


def _results(document: dict[str, Any]) -> Results:
    rows = [_row(benchmark) for benchmark in document["benchmarks"]]
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        name = (row.op, *row.key, row.candidate)
        if name in seen:
            raise UserError(f"measured twice, {' '.join(name)}, one file that holds it would do")
        seen.add(name)
    return Results(rows, document["failed"], document)


def _row(benchmark: dict[str, Any]) -> Row:
    info, stats = benchmark["extra_info"], benchmark["stats"]
    names = ("op", "network", "shape", "direction", "candidate", "count", "channels", "pixels")
    return Row(
        **{name: info[name] for name in names},
        seconds=stats["median"],
        rounds=stats["rounds"],
        floor=info["floor_seconds"],
        kept_bytes=info["kept_bytes"],
    )


def table(rows: Iterable[Row]) -> str:
    """A line per row in markdown; ratios are how many times faster than that candidate."""
    rows = list(rows)
    medians = {(row.op, *row.key, row.candidate): row.seconds for row in rows}
    lines = [
        "| op | shape | direction | candidate | median, us | share of floor | x torch.compile "
        "| x eager | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        against = [medians.get((row.op, *row.key, other)) for other in ("compile", "eager")]
        ratios = ["-" if t is None else f"{t / row.seconds:.2f}" for t in against]
        lines.append(
            f"| {row.op} | {row.network} {row.shape} | {row.direction} | {row.candidate} "
            f"| {row.seconds * 1e6:.1f} | {row.share:.0%} | {ratios[0]} | {ratios[1]} "
            f"| {row.rounds} |"
        )
    return "\n".join(lines)
