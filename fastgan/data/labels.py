"""Labels of a dataset: from its dataset.json or from the names of class folders.

dataset.json is EDM's: {"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}; an int
is a class, a list of numbers a vector. Other keys are allowed and EDM's loader ignores them too.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastgan.common.errors import UserError, shown

# A bound on label_dim: one absurd label must not make a network of gigabytes.
MAX_CLASSES = 1 << 20
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# EDM zips and FFHQ deal their images out to folders 00000, 00001, ...: no classes.
_CHUNK_FOLDER = re.compile(r"\d{5}")


def labels_from_index(entries: Any, names: Sequence[str], where: str) -> np.ndarray | None:
    """Labels in the order of `names`: int64 [n], float32 [n, label_dim], or None for null.

    Labels of images that are not in `names` are ignored, as EDM does; an image without a label, a
    malformed label or classes mixed with vectors is a UserError naming the image.
    """
    if entries is None:
        return None
    table = _table(entries, where)
    missing = [name for name in names if name not in table]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"no label for {missing[0]!r}{others}, {where}, one per image expected")
    values = [table[name] for name in names]
    if isinstance(values[0], list):
        width = len(values[0])

        def is_vector(v: Any) -> bool:
            return isinstance(v, list) and len(v) == width > 0 and all(map(_is_real, v))

        expected = f"{max(width, 1)} finite numbers expected as in the first label"
        _check(values, names, where, is_vector, expected)
        return np.array(values, np.float32)
    _check(values, names, where, _is_class, f"a class from 0 to {MAX_CLASSES - 1} expected")
    return np.array(values, np.int64)


def labels_from_folders(names: Sequence[str], where: str) -> np.ndarray:
    """int64 [n]: the rank of each name's first folder in alphabetical order."""
    folders = []
    for name in names:
        folder, slash, _ = name.partition("/")
        if not slash:
            raise UserError(f"image {name!r} in no class folder, {where}, class/image expected")
        folders.append(folder)
    return np.unique(folders, return_inverse=True)[1].astype(np.int64)


def has_class_folders(names: Sequence[str]) -> bool:
    """Whether the images lie one level deep in two or more folders that are not numbered chunks."""
    folders = {name.rpartition("/")[0] for name in names}
    nested = any(not folder or "/" in folder for folder in folders)
    chunks = all(_CHUNK_FOLDER.fullmatch(folder) for folder in folders)
    return len(folders) >= 2 and not nested and not chunks


def _table(entries: Any, where: str) -> dict[str, Any]:
    if not isinstance(entries, list):
        raise UserError(f"'labels' is no list, {where}, a list of [name, label] or null expected")
    table: dict[str, Any] = {}
    for position, entry in enumerate(entries):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f"'labels' entry {position}, {where}, [name, label] expected")
        if entry[0] in table:
            raise UserError(
                f"a second label for {shown(repr(entry[0]))}, {where}, one per image expected"
            )
        table[entry[0]] = entry[1]
    return table


def _check(
    values: list[Any], names: Sequence[str], where: str, fits: Callable[[Any], bool], expected: str
) -> None:
    for name, value in zip(names, values, strict=True):
        if not fits(value):
            given = shown(json.dumps(value), 40)
            raise UserError(f"label {given} of {name!r}, {where}, {expected}")


def _is_class(value: Any) -> bool:
    # `type` and not isinstance: true and false are ints to Python.
    return type(value) is int and 0 <= value < MAX_CLASSES


def _is_real(value: Any) -> bool:
    # The comparison is false for nan and holds for integers too large for a float.
    return type(value) in (int, float) and abs(value) <= _FLOAT32_MAX
