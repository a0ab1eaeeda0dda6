"""Numbers for the card: results of fastgan.evaluate, and what training measured."""

import math
from pathlib import Path
from typing import Any

from fastgan.checkpoint.network_file import NetworkFile
from fastgan.checkpoint.store import EMA, META
from fastgan.errors import UserError, shown
from fastgan.files import require_file
from fastgan.json_object import parse_object

_MAX_BYTES = 1 << 20
_MOST = 32  # numbers of one training
_KEYS: dict[str, type | tuple[type, ...]] = {
    "metric": str,
    "value": (int, float),
    "n": int,
    "seeds": str,
    "sampler": dict,
    "extractor": dict,
    "reference": dict,
    "checkpoint": dict,
}


def read_result(path: str | Path, source: NetworkFile) -> dict[str, Any]:
    """A result of fastgan.evaluate for the network file `source`; UserError for anything else."""
    expected = "a result of fastgan.evaluate for a checkpoint expected"
    result = _object(require_file(path, "a result of fastgan.evaluate"), expected)
    for key, kind in _KEYS.items():
        value = result.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{key}={shown(value)}, {path}, {expected}")
    if not _is_number(result["value"]):
        raise UserError(f"value={shown(result['value'])}, {path}, a finite number expected")
    measured = result["checkpoint"]
    if measured.get("sha256") != source.sha256:
        raise UserError(
            f"measured with {shown(measured.get('file'))} of sha256 "
            f"{shown(measured.get('sha256'))}, {path}, a result of {source.path} expected, "
            f"whose sha256 is {source.sha256}"
        )
    return result


def training_metrics(source: NetworkFile) -> dict[str, float]:
    """What a run measured when it saved `source`: meta.json beside it; {} where there is none.

    UserError where that is damaged or says that it belongs to another file.
    """
    path = source.path.with_name(META)
    if source.path.name != EMA or not path.is_file():
        return {}
    expected = "the meta.json of this checkpoint expected"
    facts = _object(path, expected)
    digests, metrics = facts.get("sha256"), facts.get("metrics")
    if not isinstance(digests, dict) or not isinstance(metrics, dict):
        raise UserError(f"no objects sha256 and metrics, {path}, {expected}")
    if digests.get(EMA) != source.sha256:
        raise UserError(f"another sha256 of {EMA} than its own, {path}, {expected}")
    numbers = {name: value for name, value in metrics.items() if _is_number(value)}
    return dict(list(numbers.items())[:_MOST])


def _object(path: Path, expected: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        return parse_object(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(error)}, {path}, {expected}") from error


def _is_number(value: object) -> bool:
    """Finite, and no integer beyond float's range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else value.bit_length() < 1000
