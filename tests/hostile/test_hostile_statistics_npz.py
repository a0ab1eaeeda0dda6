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
from tests.hostile.damage import damaged
from tests.hostile.harness import Case, Suite, assert_harmless
from tests.hostile.zips import DEFLATED, Entry, archive, changed, false_indices, lies

DIM = 6
FEATURES = np.random.default_rng(0).normal(size=(40, DIM))
ARRAYS = {
    "mu": FEATURES.mean(0),
    "sigma": np.cov(FEATURES.T),
    "provenance": np.array(json.dumps({"n": 40, "extractor": "inception", "seeds": "0-39"})),
    "arr_0": np.random.default_rng(1).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8),
}
OTHER_ARRAYS: dict[str, list[Any]] = {
    "mu": [
        np.zeros(0), np.zeros(DIM + 1), np.zeros((DIM, 1)), np.zeros(()), np.zeros((1,) * 32),
        np.zeros(DIM, np.int64), np.zeros(DIM, np.complex128), np.zeros(DIM, np.float16),
        np.zeros(DIM, bool), np.full(DIM, np.nan), np.full(DIM, np.inf), np.full(DIM, 1e300),
        np.array(["x"] * DIM), np.array([b"x"] * DIM), np.zeros(DIM, "M8[s]"), np.zeros(DIM, ">f8"),
        np.zeros(DIM, [("a", "f8")]), np.zeros(9000), np.zeros(DIM, np.longdouble),
    ],
    "sigma": [
        np.eye(DIM + 1), np.zeros((DIM, DIM + 1)), np.zeros(DIM * DIM), np.zeros((DIM, DIM, 1)),
        np.full((DIM, DIM), np.nan), np.triu(np.ones((DIM, DIM))), np.full((DIM, DIM), -np.inf),
        np.asfortranarray(np.eye(DIM)), np.eye(DIM, dtype=np.int32), np.eye(DIM) * 1e200,
    ],
    "provenance": [
        np.array("{"), np.array("[1]"), np.array("null"), np.array(""), np.array(b"{}"),
        np.zeros(3), np.array(["{}", "{}"]), np.array("[" * 100_000),
        np.array("{}" + " " * 300_000),
        np.array('{"a":' * 990 + "1" + "}" * 990), np.array("9" * 5000), np.array('{"a": "\x1b"}'),
    ],
    "arr_0": [
        np.zeros((0, 4, 4, 3), np.uint8), np.zeros((5, 4, 4, 2), np.uint8),
        np.zeros((5, 4, 5, 3), np.uint8), np.zeros((5, 0, 0, 3), np.uint8),
        np.zeros((5, 3, 4, 4), np.uint8), np.zeros((5, 4, 4), np.uint8),
        np.zeros((5, 4, 4, 3), np.int8), np.zeros((5, 4, 4, 3)), np.zeros((1, 5000, 5000, 1),
        np.uint8),
        np.asfortranarray(np.zeros((5, 4, 4, 3), np.uint8)), np.zeros((5, 4, 4, 3, 1), np.uint8),
    ],
}  # fmt: skip
# Texts of provenance that may be read, and must then do no harm.
PROVENANCES = [
    '{"n": 1e999}', '{"n": NaN}', '{"n": true}', '{"n": -1}', '{"n": 0}', '{"n": 5.5}',
    '{"n": "5"}',
    '{"n": ' + "9" * 4000 + "}", '{"n": [5]}', '{"file": "x", "sha256": "y"}', '{"n": 1, "n": 2}',
    '{"a": "\\ud800"}', '{"a": "\\u001b[2J"}', '{"extractor": {"name": []}}', "{}", '{"": 1}',
    '{"a": ' + "[" * 800 + "]" * 800 + "}", '{"extractor": null}', '{"weights_sha256": 5}',
    '{"a": ' + "[" * 900 + "]" * 900 + "}", '{"a":' * 400 + "1" + "}" * 400,
]  # fmt: skip
SHAPES = [
    "()", "(0,)", "(-1,)", "(6,)", "(6.0,)", "('6',)", "(True,)", "(None,)", "[6]", "6", "(6, -6)",
    "(2**40,)", "(4611686018427387904, 4)", "(1099511627776,)", "(10**30,)", "(1, 0)", "((6,),)",
    "(99999999999999999999999999999999,)", "(8192,)", "(8193,)", "(1,) * 64", "(6j,)",
    "(8192, 8192)", "(65536, 65536)", "(4294967296, 4294967296)", "(" + "1," * 40 + ")",
]  # fmt: skip
DTYPES = [
    "|O", "O", "<f2", ">f8", "<f4", "<f16", "<c16", "<i8", "|b1", "|S0", "|S1000000000", "<U0",
    "<U268435456", "|V8", "|V2147483647", "<M8[ns]", "<m8[ps]", "f8", "float64", "double", "8f8",
    "(2,3)f8", "f8,f8", "a,b", "", " ", "\\x00", "x" * 3000, "np.float64",
    "datetime64[99999999999Y]",
]  # fmt: skip
HEADERS = [
    "", "{}", "1", "None", "[]", "{", "}", "{'descr'", "__import__('os').system('touch executed')",
    "{'descr': __import__('os'), 'fortran_order': False, 'shape': (6,)}", "(" * 90, "[" * 3000,
    "{" * 3000, "-" * 3000 + "1", "1" + "+1" * 1500, "'" + "a" * 3000, "lambda: 0", "(lambda: 0)()",
    "{'descr': '<f8', 'fortran_order': 0, 'shape': (6,)}", "{'descr': '<f8', 'shape': (6,)}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (6,), 'x': 1}", "9" * 3900,
    "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 3900 + ",)}", "\x00" * 50,
    "{'descr': '<f8', 'fortran_order': False, 'shape': (6,)}" + " " * 60_000, "{**{}}", "f'{1}'",
    "{'descr': [('a', '<f8'), ('a', '<f8')], 'fortran_order': False, 'shape': (6,)}", "{1: 2}",
    "{'descr': [['a']], 'fortran_order': False, 'shape': (6,)}", "b'x' * 10 ** 9", "10 ** 10 ** 10",
    "{'descr': {'names': ['a'], 'formats': ['O']}, 'fortran_order': False, 'shape': (6,)}",
    "\u00e4",
    "{'descr': ('<f8', (2, 2)), 'fortran_order': False, 'shape': (6,)}", "{(): ()}", "{[]: 1}",
]  # fmt: skip


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@cache
def members(method: int = DEFLATED) -> tuple[Entry, ...]:
    return tuple(Entry(f"{n}.npy".encode(), npy(a), method) for n, a in ARRAYS.items())


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def raw_npy(header: str, data: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("utf-8" if version[0] > 2 else "latin1").ljust(118) + b"\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + data


def with_member(name: str, content: bytes, alone: bool = False) -> bytes:
    at = list(ARRAYS).index(name)
    changed_ = changed(list(members()), at, data=content)
    return archive([e for e in changed_ if not alone or e.name != b"arr_0.npy"])


def _arrays() -> list[Case]:
    cases = []
    for name, others in OTHER_ARRAYS.items():
        for i, array in enumerate(others):
            label = f"{name} {i}: {array.dtype} {array.shape}"[:60]
            cases.append(Case("array", label, with_member(name, npy(array)), "refused"))
    for name in ARRAYS:
        for dim in (0, 1):
            runs = np.array([Runs()] * 2 if dim else Runs(), dtype=object)
            content = with_member(name, npy(runs))
            cases.append(Case("pickle", f"objects as {name}, {dim}", content, "refused"))
        content = with_member(name, pickle.dumps(Runs()))
        cases.append(Case("pickle", f"{name} is a pickle", content, "refused"))
    for i, text in enumerate(PROVENANCES):
        content = with_member("provenance", npy(np.array(text)))
        cases.append(Case("provenance", f"{i}: {text[:30]}", content))
    for points in (0x110000, 0xFFFFFFFF, 0xD800, 0, 0x1B):
        header = "{'descr': '<U4', 'fortran_order': False, 'shape': ()}"
        content = with_member("provenance", raw_npy(header, struct.pack("<I", points) * 4))
        cases.append(Case("provenance", f"code points {points:x}", content, "refused"))
    missing = [e for e in members() if e.name not in (b"mu.npy", b"arr_0.npy")]
    for i in range(4):
        content = archive([e for k, e in enumerate(members()) if k != i])
        cases.append(Case("array", f"without entry {i}", content))
    return [*cases, Case("array", "neither mu nor images", archive(missing), "refused")]


def _headers() -> list[Case]:
    cases = []
    for name, descr in (("mu", "<f8"), ("sigma", "<f8"), ("arr_0", "|u1")):
        for shape in SHAPES:
            text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"
            right = (name, shape) == ("mu", "(6,)")
            content = with_member(name, raw_npy(text, bytes(2000)))
            expected = "valid" if right else "refused"
            cases.append(Case("shape", f"{name} {shape[:40]}", content, expected))  # type: ignore[arg-type]
    for dtype in DTYPES:
        text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (6,)}}"
        expected = "valid" if dtype in ("f8", "float64", "double", "<f4") else "refused"
        content = with_member("mu", raw_npy(text, bytes(2000)))
        cases.append(Case("dtype", f"{dtype[:40]}", content, expected))  # type: ignore[arg-type]
    for i, text in enumerate(HEADERS):
        content = with_member("mu", raw_npy(text, bytes(100)))
        cases.append(Case("npy header", f"{i}: {text[:30]!a}", content, "refused"))
    right = "{'descr': '<f8', 'fortran_order': False, 'shape': (6,)}"
    for version in ((0, 0), (1, 1), (2, 0), (3, 0), (4, 0), (255, 255)):
        content = with_member("mu", raw_npy(right, bytes(48), version))
        cases.append(Case("npy header", f"version {version}", content))
    for length in (0, 1, 5, 6, 7, 8, 9, 10, 11, 127, 128, 129, 175):
        content = with_member("mu", npy(ARRAYS["mu"])[:length])
        cases.append(Case("npy header", f"first {length} bytes", content, "refused"))
    claimed = b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + right.encode()
    cases.append(Case("npy header", "4 GB of header", with_member("mu", claimed), "refused"))
    return cases


def _bombs() -> list[Case]:
    def zeros(shape: str, size: int, descr: str = "<f8") -> bytes:
        text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"
        return raw_npy(text, bytes(size))

    large = [
        Entry(b"mu.npy", zeros("(4096,)", 4096 * 8), DEFLATED),
        Entry(b"sigma.npy", zeros("(4096, 4096)", 4096 * 4096 * 8), DEFLATED),
    ]
    images = zeros("(99999999, 512, 512, 3)", 60_000_000, "|u1")
    wide = zeros("(9, 4096, 4096, 3)", 60_000_000, "|u1")
    text = npy(np.array("{}" + " " * 200_000))
    many = [Entry(b"%05d.npy" % i, b"") for i in range(20_000)]
    contents: dict[str, tuple[bytes, Any]] = {
        "sigma of zeros": (archive(large), "refused"),
        "sigma of zeros, packed size false": (
            archive(changed(large, 1, central={"packed": 2**31})), "refused",
        ),
        "more images than there are": (with_member("arr_0", images), "refused"),
        "images of 48 MB": (with_member("arr_0", wide), "refused"),
        "long provenance": (with_member("provenance", text), "valid"),
        "a zip": (with_member("mu", archive(list(members()))), "refused"),
        "20,000 entries": (archive([*members(), *many]), "valid"),
        "40 MB of header": (with_member("mu", b"\x93NUMPY\x02\x00" + struct.pack("<I", 40_000_000)
                                        + b" " * 40_000_000), "refused"),
    }  # fmt: skip
    cases = [Case("bomb", name, content, to) for name, (content, to) in contents.items()]
    for name in ("../mu.npy", "/mu.npy", "mu.npy\0x", "x/mu.npy", "mu.npy/", "", "\x1b[31m"):
        content = archive(changed(list(members()), 0, name=name.encode()))
        cases.append(Case("path", f"mu as {name!r}", content))
    twice = archive([*members(), members()[0]])
    places = {"a folder": Path.mkdir, "a pipe": os.mkfifo, "nothing": lambda p: None}
    places["a device"] = lambda p: p.symlink_to("/dev/zero")
    cases += [Case("place", name, make, "refused") for name, make in places.items()]
    return [*cases, Case("path", "mu twice", twice)]


def cases() -> list[Case]:
    valid = archive(list(members()))
    index = valid.index(b"PK\1\2")
    hot = [(0, 160), (index, len(valid)), (len(valid) - 22, len(valid))]
    file = io.BytesIO()
    np.savez(file, **ARRAYS)
    stored = file.getvalue()
    other = [Case("valid", "as numpy writes it", stored, "valid")]
    plain = [
        Case(f"stored {c.kind}", c.name, c.content, c.expected)
        for c in damaged(stored, seed=7, hot=[(0, 160), (len(stored) - 250, len(stored))])
        if c.kind in ("flip", "cut")
    ]
    return [
        *damaged(valid, seed=6, hot=hot), *other, *plain, *lies(list(members()), 0),
        *false_indices(list(members())), *_arrays(), *_headers(), *_bombs(),
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


def test_statistics_npz() -> None:
    assert_harmless(Path(__file__).stem)
