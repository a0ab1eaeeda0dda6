"""dataset.json: the labels of a dataset's images, in a folder or a zip."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data import open_dataset
from fastgan.data.labels import MAX_CLASSES
from tests.hostile.damage import damaged, each, listed, places
from tests.hostile.dataset_zip import PIXELS, png
from tests.hostile.harness import Case, Suite

NAMES = ["0.png", "1.png", "2.png", "3.png"]
LABELS = [[name, i] for i, name in enumerate(NAMES)]
INDEX = {"labels": LABELS, "resampling": "lanczos", "source": "x"}
VECTORS = {"labels": [[name, [0.25 * i, -1.0]] for i, name in enumerate(NAMES)]}
RAW = "\0"  # replaced by raw JSON text in the dumped index
# Instead of the class of 2.png.
RAW_LABELS = [
    "-1", "1.0", "2.5", "true", "false", "null", '"2"', '""', "{}", '{"class": 2}', "[2]", "[[2]]",
    f"{MAX_CLASSES}", f"{2**31}", f"{2**63}", "1" + "0" * 300, "0.1", "1e300", "NaN", "Infinity",
    "-Infinity", "1e999", "1e", "0x2", "02", "+2", ".5", "2.", "--2", "9" * 4000, "9" * 5000,
    "1" + "0" * 500_000, "[" * 100_000, "[]", "[" * 900 + "]" * 900, "[" * 300 + "2" + "]" * 300,
    '{"a":' * 5000, "nul", "'2'", '"\\ud800"', '"\\u00"', '"\x01"', '"' + "a" * 1_000_000 + '"',
    "2 3", "/* two */ 2", "[2,]", "2]", '"' + "\\u001b[31m" * 10 + '"', '{"a": 1, "a": 1}',
    "[" + "1," * 200_000 + "1]", '{"a":' * 480 + "1" + "}" * 480,
]  # fmt: skip
# Instead of a number of a vector, and of a whole vector.
VALUES = [
    "NaN", "Infinity", "1e39", "-1e39", "1" + "0" * 400, "null", "true", '"1"', "[1]", "{}",
]  # fmt: skip
WIDTHS = [json.dumps([0.5] * width) for width in (0, 1, 3, 1000)]
ENTRIES: list[Any] = [
    None, 0, "2.png", [], {}, ["2.png"], ["2.png", 2, 2], [2, "2.png"], [None, 2], [["2.png"], 2],
    {"2.png": 2}, ["2.png ", 2], ["./2.png", 2], ["2.PNG", 2], ["/2.png", 2], ["2.png\0", 2],
    ["../case/2.png", 2], ["", 2], ["3.png", 2], ["0.png", 0], ["a" * 100_000, 2],
    ["\x1b[31m", 2], ["0.png\nerror: x", 0],
]  # fmt: skip
WHOLE: list[Any] = [
    None, 0, 1.5, True, "labels", [], [[]], {}, {"labels": 3}, {"labels": "x"}, {"labels": {}},
    {"labels": True}, {"labels": []}, {"labels": [None]}, {"labels": {"0.png": 1}},
    {"Labels": None}, {"labels ": None}, [INDEX], {"labels": INDEX}, {"labels": [INDEX]},
]  # fmt: skip
# Under keys that a number's provenance repeats, or that mean something elsewhere.
BESIDE = [
    "[" * 900 + "]" * 900, '"' + "x" * 900_000 + '"', "9" * 4000, '"\\u001b[2J\\n"', '"\\ud800"',
    '{"a": {"b": [1, null, NaN]}}', "1e999", '{"a":' * 450 + "1" + "}" * 450, '""', "null",
    "[" + "0," * 300_000 + "0]",
]  # fmt: skip


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _with_label(raw: str) -> bytes:
    labels = [[name, RAW if i == 2 else 1] for i, name in enumerate(NAMES)]
    return json.dumps({"labels": labels}).replace(json.dumps(RAW), raw).encode()


def _sizes() -> list[Case]:
    whole = json.dumps(INDEX)
    more = [[f"{i}.jpg", i] for i in range(30_000)]
    large = {
        "spaces behind": (whole + " " * 2_000_000).encode(),
        "too many lists": b'{"labels": null, "x": [' + b"[]," * 600_000 + b"[]]}",
    }
    harmless = {
        "labels of 30,000 other images": _dumped({"labels": [*LABELS, *more]}),
        "many lists": b'{"labels": null, "x": [' + b"[]," * 300_000 + b"[]]}",
        "UTF-16": whole.encode("utf-16"), "vectors": _dumped(VECTORS), "null": b'{"labels": null}',
    }  # fmt: skip
    return [*listed("size", large), *listed("encoding", harmless, "valid")]


def cases() -> list[Case]:
    vectors = json.dumps(VECTORS)
    levels = (100, 500, 960, 990, 2000, 100_000)
    nested = ["[" * n + "]" * n for n in levels]
    nested += ['{"labels":' * n + "1" + "}" * n for n in levels]
    return [
        *damaged(_dumped(INDEX), seed=5),
        *each("label", RAW_LABELS, _with_label),
        *each("vector", VALUES, lambda raw: vectors.replace("0.5", raw).encode()),
        *each("width", WIDTHS, lambda raw: vectors.replace("[0.5, -1.0]", raw).encode()),
        *listed("width", {"none": _dumped({"labels": [[name, []] for name in NAMES]})}),
        *each("entry", ENTRIES, lambda e: _dumped({"labels": [*LABELS[:2], e, LABELS[3]]})),
        *each("structure", WHOLE, _dumped),
        *each("source", BESIDE, lambda raw: f'{{"labels": null, "source": {raw}}}'.encode(), None),
        *each("beside", BESIDE, lambda raw: f'{{"labels": null, "x": {raw}}}'.encode(), None),
        *each("nesting", nested, str.encode),
        *_sizes(),
        *places(nothing="valid", folder="valid", pipe="valid"),
    ]


def read(path: Path) -> None:
    dataset = open_dataset(path.parent)
    assert len(dataset) == len(NAMES) and 0 <= dataset.label_dim <= MAX_CLASSES
    labels = dataset.labels
    if labels is not None:
        assert len(labels) == len(NAMES) and np.isfinite(labels).all()
        assert labels.dtype == (np.int64 if labels.ndim == 1 else np.float32)
    told = json.dumps(dataset.provenance())
    assert told.isprintable() and len(told) < 2000


IMAGES = {name: png(PIXELS[0]) for name in NAMES}
SUITE = Suite("dataset.json", "dataset.json", cases, read, beside=IMAGES)
