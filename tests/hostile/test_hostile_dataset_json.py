"""dataset.json: the labels of a dataset's images, in a folder or a zip."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data import open_dataset
from fastgan.data.labels import MAX_CLASSES
from tests.hostile.damage import damaged
from tests.hostile.harness import Case, Suite, assert_harmless
from tests.hostile.pictures import PIXELS, png

NAMES = ["0.png", "1.png", "2.png", "3.png"]
INDEX = {
    "labels": [[name, i] for i, name in enumerate(NAMES)],
    "resampling": "lanczos",
    "source": "x",
}
VECTORS = {"labels": [[name, [0.25 * i, -1.0]] for i, name in enumerate(NAMES)]}
RAW = "\0"  # replaced by raw JSON text in the dumped index
# Instead of the label of 2.png; raw texts that json.dumps would not write.
LABELS: list[Any] = [
    -1, 1.0, 2.5, True, False, None, "2", "", {}, {"class": 2}, [2], [[2]], [None], ["2"], [True],
    MAX_CLASSES, 2**31, 2**63, 10**300, -(10**300), 0.1, 1e300,
]  # fmt: skip
RAW_LABELS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e", "0x2", "02", "+2", ".5", "2.", "--2",
    "9" * 4000, "9" * 5000, "1" + "0" * 500_000, "-" + "9" * 4299, "[" * 100_000, "[]", "[" * 900
    + "]" * 900, "[" * 700 + "2" + "]" * 700, "[" * 300 + "2" + "]" * 300, '{"a":' * 5000, "true",
    "nul", "undefined", "'2'", '"\\ud800"', '"\\u00"', '"\x01"', '"' + "a" * 1_000_000 + '"', "2 3",
    "/* two */ 2", "2,", "[2,]", "2]", '"' + "\\u001b[31m" * 10 + '"', '{"a": 1, "a": 1}',
    "[" + "1," * 200_000 + "1]", "[" * 990 + "]" * 990, '{"a":' * 480 + "1" + "}" * 480,
]  # fmt: skip
VALUES = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e39",
    "-1e39",
    "1" + "0" * 400,
    "null",
    "true",
    '"1"',
    "[1]",
    "{}",
    "1e999",
]
ENTRIES: list[Any] = [
    None, 0, "2.png", [], {}, ["2.png"], ["2.png", 2, 2], [2, "2.png"], [None, 2], [["2.png"], 2],
    [True, 2], {"2.png": 2}, ["2.png ", 2], ["./2.png", 2], ["2.PNG", 2], ["/2.png", 2],
    ["../case/2.png", 2], ["2.png\0", 2], ["", 2], ["3.png", 2], ["0.png", 0], ["a" * 100_000, 2],
    ["\x1b[31m", 2], ["0.png\nerror: x", 0],
]  # fmt: skip
WHOLE: list[Any] = [
    None, 0, 1.5, True, "labels", [], [[]], {}, {"labels": 3}, {"labels": "x"}, {"labels": {}},
    {"labels": True}, {"labels": []}, {"labels": [None]}, {"labels": {"0.png": 1}},
    {"Labels": None},
    {"label": None}, {"labels ": None}, [INDEX], {"labels": INDEX}, {"labels": [INDEX]},
]  # fmt: skip
# Keys that a number's provenance repeats, or that mean something elsewhere.
BESIDE: dict[str, str] = {
    "deep": "[" * 900 + "]" * 900, "deeper": "[" * 970 + "]" * 970,
    "long": '"' + "x" * 900_000 + '"',
    "number": "9" * 4000, "escape": '"\\u001b[2J\\n"', "surrogate": '"\\ud800"', "null": "null",
    "list": "[1, 2]", "object": '{"a": {"b": [1, null, NaN]}}', "NaN": "NaN", "float": "1e999",
    "objects in objects": '{"a":' * 450 + "1" + "}" * 450, "false": "false", "empty": '""',
    "wide": "[" + "0," * 300_000 + "0]",
}  # fmt: skip


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _with_label(raw: str) -> bytes:
    labels = [[name, RAW if i == 2 else 1] for i, name in enumerate(NAMES)]
    return json.dumps({"labels": labels}).replace(json.dumps(RAW), raw).encode()


def _with_entry(entry: Any) -> bytes:
    labels = [*INDEX["labels"][:2], entry, INDEX["labels"][3]]  # type: ignore[index]
    return _dumped({"labels": labels})


def _labels() -> list[Case]:
    texts = [json.dumps(label) for label in LABELS] + RAW_LABELS
    cases = [
        Case("label", f"{i}: {raw[:30]}", _with_label(raw), "refused")
        for i, raw in enumerate(texts)
    ]
    for i, raw in enumerate(VALUES):
        content = json.dumps(VECTORS).replace("0.5", raw).encode()
        cases.append(Case("label", f"vector {i}: {raw[:30]}", content, "refused"))
    for i, width in enumerate((0, 1, 3, 1000)):
        label = json.dumps([0.5] * width)
        content = json.dumps(VECTORS).replace("[0.5, -1.0]", label).encode()
        cases.append(Case("label", f"vector of {width}, {i}", content, "refused"))
    all_empty = _dumped({"labels": [[name, []] for name in NAMES]})
    return [*cases, Case("label", "empty vectors", all_empty, "refused")]


def _structures() -> list[Case]:
    cases = [
        Case("entry", f"{i}: {json.dumps(e)[:30]}", _with_entry(e), "refused")
        for i, e in enumerate(ENTRIES)
    ]
    cases += [
        Case("structure", f"{i}: {json.dumps(w)[:30]}", _dumped(w), "refused")
        for i, w in enumerate(WHOLE)
    ]
    for key in ("resampling", "source", "other"):
        for name, raw in BESIDE.items():
            content = f'{{"labels": null, "{key}": {raw}}}'.encode()
            cases.append(Case("beside", f"{key}: {name}", content))
    for levels in (100, 500, 900, 940, 960, 980, 990, 2000, 100_000):
        content = ("[" * levels + "]" * levels).encode()
        cases.append(Case("nesting", f"{levels} lists", content, "refused"))
        content = ('{"labels":' * levels + "1" + "}" * levels).encode()
        cases.append(Case("nesting", f"{levels} objects", content, "refused"))
    return cases


def _sizes() -> list[Case]:
    whole = json.dumps(INDEX)
    more = [[f"{i}.jpg", i] for i in range(30_000)]
    surplus = _dumped({"labels": [*INDEX["labels"], *more]})  # type: ignore[misc]
    keys = "{" + ",".join(f'"{i}": {i}' for i in range(80_000)) + ', "labels": null}'
    texts: dict[str, tuple[bytes, Any]] = {
        "spaces behind": ((whole + " " * 2_000_000).encode(), "refused"),
        "spaces in front": ((" " * 2_000_000 + whole).encode(), "refused"),
        "labels of 30,000 other images": (surplus, "valid"),
        "many keys": (keys.encode(), "valid"),
        "too many lists": (b'{"labels": null, "x": [' + b"[]," * 600_000 + b"[]]}", "refused"),
        "many lists": (b'{"labels": null, "x": [' + b"[]," * 300_000 + b"[]]}", "valid"),
        "labels twice": ((whole[:-1] + ', "labels": null}').encode(), "valid"),
        "UTF-16": (whole.encode("utf-16"), "valid"),
        "UTF-32": (whole.encode("utf-32"), "valid"),
        "a byte order mark": (whole.encode("utf-8-sig"), None),
        "vectors": (_dumped(VECTORS), "valid"),
        "null": (b'{"labels": null}', "valid"),
    }
    cases = [Case("size", name, content, to) for name, (content, to) in texts.items()]
    places = {"a folder": Path.mkdir, "a pipe": os.mkfifo, "nothing": lambda p: None}
    cases += [Case("place", name, make, "valid") for name, make in places.items()]
    outside = Case("place", "a device", lambda p: p.symlink_to("/dev/zero"), "refused")
    return [*cases, outside]


def cases() -> list[Case]:
    return [*damaged(_dumped(INDEX), seed=5), *_labels(), *_structures(), *_sizes()]


def read(path: Path) -> None:
    dataset = open_dataset(path.parent)
    assert len(dataset) == len(NAMES) and 0 <= dataset.label_dim <= MAX_CLASSES
    labels = dataset.labels
    if labels is not None:
        assert len(labels) == len(NAMES) and np.isfinite(labels).all()
        assert labels.dtype == (np.int64 if labels.ndim == 1 else np.float32)
    told = json.dumps(dataset.provenance())
    assert told.isprintable() and len(told) < 2000


SUITE = Suite(
    "dataset.json",
    "dataset.json",
    cases,
    read,
    beside={name: png(PIXELS[0]) for name in NAMES},
)


def test_dataset_json() -> None:
    assert_harmless(Path(__file__).stem)
