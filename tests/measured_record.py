"""What must be true of benchmarks/targets.json and the files that its measured rows name."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import summarise
from benchmarks.gpu_report.record import numbers
from benchmarks.results import load


def check_record(root: Path) -> None:
    """Open rows hold nothing; measured ones what their file holds and its samples give."""
    for row in summarise.read_targets(root):
        if row["status"] == "open":
            assert [row[k] for k in ("value", "machine", "result_file", "date")] == [None] * 4
            continue
        file = root / row["result_file"]
        held = json.loads(file.read_text())
        assert held["targets"][row["id"]] == row["value"]
        assert _computed(file, held)[row["id"]] == pytest.approx(row["value"])
        at_least = row["metric"].endswith("at least")
        met = row["value"] >= row["target"] if at_least else row["value"] <= row["target"]
        assert row["status"] == ("measured" if met else "missed")
        chip = held["chip"]["name"] if isinstance(held["chip"], dict) else held["chip"]
        assert row["machine"] == chip and row["date"] == held["datetime"][:10]


def _computed(file: Path, held: dict[str, Any]) -> dict[str, float]:
    """From the samples of pytest-benchmark, or of a part of tools/gpu_report.py."""
    if "benchmarks" in held:
        return summarise.values(load([file]))
    return numbers({file.stem: held})[file.stem]
