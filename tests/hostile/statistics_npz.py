"""Files of Inception statistics and of images: .npz archives of EDM, ADM and ourselves."""

import io
import json
import os
import pickle
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.evaluation.frechet import count_images, entries, read_images, read_statistics
from tests.hostile.damage import damaged, each, listed, places
from tests.hostile.harness import Case, Suite
from tests.hostile.zips import DEFLATED, Entry, archive, changed, lies

DIM = 6
FEATURES = np.random.default_rng(0).normal(size=(40, DIM))
ARRAYS = {
    "mu": FEATURES.mean(0),
    "sigma": np.cov(FEATURES.T),
    "provenance": np.array(json.dumps({"n": 40, "extractor": "inception", "seeds": "0-39"})),
    "arr_0": np.random.default_rng(1).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8),
}
IMAGES = ARRAYS["arr_0"]
OTHER_ARRAYS: dict[str, list[Any]] = {
    "mu": [
        np.zeros(0), np.zeros(DIM + 1), np.zeros((DIM, 1)), np.zeros(()), np.zeros((1,) * 32),
        *(np.zeros(DIM, t) for t in ("i8", "c16", "f2", "?", "M8[s]", ">f8", "g", [("a", "f8")])),
        np.full(DIM, np.nan), np.full(DIM, np.inf), np.full(DIM, 1e300), np.array(["x"] * DIM),
        np.zeros(9000),
    ],
    "sigma": [
        np.eye(DIM + 1), np.zeros((DIM, DIM + 1)), np.zeros(DIM * DIM), np.zeros((DIM, DIM, 1)),
        np.full((DIM, DIM), np.nan), np.triu(np.ones((DIM, DIM))), np.eye(DIM) * 1e200,
        np.asfortranarray(np.eye(DIM)), np.eye(DIM, dtype=np.int32),
    ],
    "provenance": [
        *(np.array(text) for text in ("{", "[1]", "null", "", b"{}", "[" * 100_000, "9" * 5000)),
        np.zeros(3), np.array(["{}", "{}"]), np.array("{}" + " " * 300_000),
        np.array('{"a":' * 990 + "1" + "}" * 990), np.array('{"a": "\x1b"}'),
    ],
    "arr_0": [
        IMAGES[:0], IMAGES[..., :2], IMAGES[:, :, :3], IMAGES[:, :0, :0], IMAGES[..., 0],
        IMAGES.astype(np.int8), IMAGES.astype(float), np.asfortranarray(IMAGES), IMAGES[..., None],
        np.zeros((1, 5000, 5000, 1), np.uint8),
    ],
}  # fmt: skip
# Texts of provenance that may be read, and must then do no harm.
PROVENANCES = [
    *(f'{{"n": {n}}}' for n in ("1e999", "NaN", "true", "-1", '"5"', "9" * 4000, "[5]")), "{}",
    '{"file": "x", "sha256": "y"}', '{"a": "\\ud800"}', '{"extractor": {"name": []}}',
    '{"a": ' + "[" * 900 + "]" * 900 + "}", '{"a":' * 400 + "1" + "}" * 400,
]  # fmt: skip
SHAPES = [
    "()", "(0,)", "(-1,)", "(6.0,)", "('6',)", "(True,)", "[6]", "6", "(2**40,)", "(8193,)",
    "(4611686018427387904, 4)", "(1099511627776,)", "(1, 0)", "((6,),)", "(6j,)", "(8192, 8192)",
    "(4294967296, 4294967296)", "(" + "1," * 40 + ")",
]  # fmt: skip
DTYPES = [
    "|O", "<f2", ">f8", "<f16", "<c16", "<i8", "|b1", "|S1000000000", "<U268435456", "|V8",
    "<M8[ns]", "8f8", "(2,3)f8", "f8,f8", "a,b", "", "\\x00", "x" * 3000, "np.float64",
]  # fmt: skip
RIGHT = "{'descr': '<f8', 'fortran_order': False, 'shape': (6,)}"
HEADERS = [
    "", "{}", "1", "None", "{", "__import__('os').system('touch executed')", "(" * 90, "[" * 3000,
    RIGHT.replace("'<f8'", "__import__('os')"), "-" * 3000 + "1", "1" + "+1" * 1500, "9" * 3900,
    "(lambda: 0)()", RIGHT.replace("False", "0"), "{'descr': '<f8', 'shape': (6,)}",
    RIGHT[:-1] + ", 'x': 1}", RIGHT.replace("6", "9" * 3900), RIGHT + " " * 60_000, "{**{}}",
    "f'{1}'", "b'x' * 10 ** 9", "10 ** 10 ** 10", "\u00e4", "{[]: 1}", "\x00" * 50,
    RIGHT.replace("'<f8'", "[['a']]"), RIGHT.replace("'<f8'", "('<f8', (2, 2))"),
    RIGHT.replace("'<f8'", "{'names': ['a'], 'formats': ['O']}"),
]  # fmt: skip
VERSIONS = [(0, 0), (1, 1), (2, 0), (3, 0), (4, 0), (255, 255)]
PATHS = ["../mu.npy", "/mu.npy", "mu.npy\0x", "x/mu.npy", "mu.npy/", "", "\x1b[31m"]


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@cache
def members() -> list[Entry]:
    return [Entry(f"{n}.npy".encode(), npy(a), DEFLATED) for n, a in ARRAYS.items()]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def raw_npy(header: str, size: int = 2000, version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("utf-8" if version[0] > 2 else "latin1").ljust(118) + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + bytes(size)


def described(shape: str, descr: str = "<f8", size: int = 2000) -> bytes:
    return raw_npy(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}", size)


def with_member(name: str, content: bytes) -> bytes:
    return archive(changed(members(), list(ARRAYS).index(name), data=content))


def _arrays() -> list[Case]:
    found = []
    for name, others in OTHER_ARRAYS.items():
        found += each(f"other {name}", others, lambda a, n=name: with_member(n, npy(a)))  # type: ignore[misc]
        descr = "|u1" if name == "arr_0" else "<f8"
        shaped = {f"{name} {s[:40]}": with_member(name, described(s, descr)) for s in SHAPES}
        found += listed("shape", shaped)
        runs = [pickle.dumps(Runs()), *(npy(np.array(r, dtype=object)) for r in (Runs(), [Runs()]))]
        found += [*each(f"pickle as {name}", runs, lambda p, n=name: with_member(n, p))]  # type: ignore[misc]
    return found


def _headers() -> list[Case]:
    lengths = (0, 1, 5, 6, 7, 8, 9, 10, 11, 127, 128, 129, 175)
    claimed = [b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + RIGHT.encode()]
    claimed.append(b"\x93NUMPY\x02\x00" + struct.pack("<I", 40_000_000) + b" " * 40_000_000)
    points = [struct.pack("<I", p) * 4 for p in (0x110000, 0xFFFFFFFF, 0xD800, 0, 0x1B)]
    four = described("()", "<U4", 0)
    return [
        *each("dtype", DTYPES, lambda dtype: with_member("mu", described("(6,)", dtype))),
        *each("npy header", HEADERS, lambda text: with_member("mu", raw_npy(text))),
        *each("version", VERSIONS, lambda v: with_member("mu", raw_npy(RIGHT, 48, v)), None),
        *each("first bytes", lengths, lambda n: with_member("mu", npy(ARRAYS["mu"])[:n])),
        *each("large header", claimed, lambda header: with_member("mu", header)),
        *each("code points", points, lambda data: with_member("provenance", four + data)),
    ]


def _contents() -> list[Case]:
    large = [
        Entry(b"mu.npy", described("(4096,)", size=4096 * 8), DEFLATED),
        Entry(b"sigma.npy", described("(4096, 4096)", size=4096 * 4096 * 8), DEFLATED),
    ]
    wrong = {
        "sigma of zeros": large, "packed size false": changed(large, 1, central={"packed": 2**31}),
        "neither mu nor images": members()[1:3],
    }  # fmt: skip
    images = {
        "more images than there are": described("(99999999, 512, 512, 3)", "|u1", 60_000_000),
        "images of 48 MB": described("(9, 4096, 4096, 3)", "|u1", 60_000_000),
    }
    many = [*members(), *(Entry(b"%05d.npy" % i, b"") for i in range(20_000))]
    file = io.BytesIO()
    np.savez(file, **ARRAYS)
    right = {
        "as numpy writes it": file.getvalue(), "20,000 entries": archive(many),
        "long provenance": with_member("provenance", npy(np.array("{}" + " " * 200_000))),
    }  # fmt: skip
    return [
        *listed("contents", {name: archive(found) for name, found in wrong.items()}),
        *listed("contents", {n: with_member("arr_0", content) for n, content in images.items()}),
        *listed("contents", {"a zip": with_member("mu", archive(members()))}),
        *listed("valid", right, "valid"),
    ]


def cases() -> list[Case]:
    valid = archive(members())
    hot = [(0, 160), (valid.index(b"PK\1\2"), len(valid)), (len(valid) - 22, len(valid))]
    others = [[e for k, e in enumerate(members()) if k != i] for i in range(len(ARRAYS))]
    return [
        *damaged(valid, seed=6, hot=hot), *lies(members(), 0), *_arrays(), *_headers(),
        *each("provenance", PROVENANCES, lambda t: with_member("provenance", npy(np.array(t))),
              None),
        *each("path", PATHS, lambda n: archive(changed(members(), 0, name=n.encode())), None),
        *each("without one", others, archive, None), *_contents(), *places(),
    ]  # fmt: skip


def read(path: Path) -> None:
    """Everything that evaluation reads from such a file."""
    names = entries(path)
    if "mu" in names or "arr_0" not in names:
        s = read_statistics(path)
        assert s.mean.shape == (s.dim,) and s.covariance.shape == (s.dim, s.dim) and s.dim <= 8192
        assert s.mean.isfinite().all() and s.covariance.isfinite().all()
        assert s.n is None or (type(s.n) is int and 0 < s.n < 2**63)
        assert len(json.dumps({"a": [s.source]})) < 1 << 21
    if "arr_0" in names:
        count = 0
        for images in read_images(path, 4):
            assert images.ndim == 4 and images.shape[1] in (1, 3) and len(images) <= 4
            count += len(images)
        assert count == count_images(path) > 0


SUITE = Suite("statistics npz", "reference.npz", cases, read)
