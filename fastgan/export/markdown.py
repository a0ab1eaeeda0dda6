"""Strangers' texts in a markdown document: shown letter by letter, never understood."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from fastgan.errors import shown

_LONGEST = 10_000  # characters of a text that are looked at
# What would end a code span, and what would end a table's cell.
_ESCAPED = {"`": "\\x60", "|": "\\x7c"}


def code(value: object, limit: int = 120) -> str:
    """A number or text as one code span of at most `limit` characters, give or take escapes.

    Nothing in it becomes a link, an image or HTML, in a table neither.
    """
    if value is None:
        return "-"
    text = " ".join(value[:_LONGEST].split()) if isinstance(value, str) else value
    line = shown(text, limit).strip()
    for character, escape in _ESCAPED.items():
        line = line.replace(character, escape)
    return f"`{line}`" if line else "-"


def leaves(value: object, most: int = 40) -> list[tuple[str, Any]]:
    """The first `most` values in a JSON value with their dotted names, lists of numbers whole."""
    return list(islice(_leaves(value, ""), most))


def listed(value: object, most: int = 12, limit: int = 400) -> str:
    """The same as one code span: `name resnet56, n 50000`."""
    found = (f"{name} {shown(leaf)}" for name, leaf in leaves(value, most))
    return code(", ".join(found), limit)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table of cells that are markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _leaves(value: object, name: str) -> Iterator[tuple[str, Any]]:
    prefix = f"{name}." if name else ""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, prefix + shown(str(key), 40))
    elif isinstance(value, list) and not _is_short(value):
        for index, child in enumerate(value):
            yield from _leaves(child, f"{prefix}{index}")
    else:
        whole = " ".join(map(shown, value)) if isinstance(value, list) else value
        yield name, "null" if whole is None else whole


def _is_short(values: list[Any]) -> bool:
    return len(values) <= 16 and all(isinstance(value, int | float) for value in values)
