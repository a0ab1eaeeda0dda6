"""JSON objects out of strangers' files."""

import json
from typing import Any

from fastgan.errors import shown

MAX_LEVELS = 100


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object that `text` holds; ValueError, whose text says why, for anything else.

    An object of more than MAX_LEVELS is refused: one that can just be read could not be written
    again as part of another one.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed JSON: {shown(error)}") from error
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    if _levels(value) > MAX_LEVELS:
        raise ValueError(f"more than {MAX_LEVELS} levels of JSON")
    return value


def _levels(value: object) -> int:
    levels, layer = 0, [value]
    while layer:
        levels += 1
        layer = [child for item in layer for child in _children(item)]
    return levels


def _children(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
