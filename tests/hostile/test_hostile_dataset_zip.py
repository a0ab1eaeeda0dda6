"""Dataset zips, and folders in their place: archives, names, pictures."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np

from fastgan.data import open_dataset
from tests.hostile.damage import damaged
from tests.hostile.harness import Case, Suite, assert_harmless
from tests.hostile.pictures import PIXELS, header, many_scans, picture, picture_bombs, png
from tests.hostile.zips import DEFLATED, Entry, archive, changed, false_indices, lies

NAMES = [b"00000/img00000000.png", b"00000/img00000001.png", b"00000/img00000002.png"]
OUTSIDE = [
    "../a.png", "../../a.png", "x/../../a.png", "/a.png", "//a.png", "/etc/a.png", "..\\a.png",
    "C:/a.png", "C:a.png", "c:\\a.png", "\\\\host\\a.png", "a/..", "./../a.png", "a/../../b.png",
    "~/../a.png", "/proc/self/mem.png", "x:y/a.png", "..", "a\\..\\b.png",
]  # fmt: skip
ODD_NAMES = [
    "", ".", "./", "./.", "a.png/", ".png", "..png", "...", "a\0b.png", "a\x1b[31m.png", "a\nb.png",
    "a\r\nerror: b.png", "a\u202egnp.png", "\u2028.png", "a.png ", "a.PNG", "con.png", "a" * 30_000
    + ".png", "a/" * 2000 + "a.png", "__MACOSX/a.png", ".hidden/a.png", "dataset.json/a.png",
    "x/dataset.json", "DATASET.JSON", "dataset.json ", "0/" * 100 + "dataset.json",
]  # fmt: skip


@cache
def entries(method: int = DEFLATED) -> list[Entry]:
    index = {"labels": [[name.decode(), i] for i, name in enumerate(NAMES)]}
    images = [Entry(name, png(p), method) for name, p in zip(NAMES, PIXELS, strict=True)]
    return [*images, Entry(b"dataset.json", json.dumps(index).encode(), method)]


def _with_image(data: bytes, at: int = 1, name: bytes = NAMES[1]) -> bytes:
    return archive(changed(entries(), at, data=data, name=name, method=DEFLATED))


def _shapes() -> list[Case]:
    sizes = [(0, 0), (0, 8), (8, 0), (1, 1), (8, 9), (2**31 - 1, 1), (1, 2**31 - 1), (4097, 4097)]
    sizes += [(2**31 - 1, 2**31 - 1), (2**32 - 1, 2**32 - 1), (8192, 8192), (65_535, 1024)]
    cases = []
    for width, height in sizes:
        data = picture(header(width, height), bytes(3_000_000))
        for at in (0, 1):
            label = f"PNG of {width} x {height} as image {at}"
            content = _with_image(data, at, NAMES[at])
            cases.append(Case("shape", label, content, "refused"))
    odd = [(16, 2, 0), (16, 0, 0), (1, 0, 0), (4, 3, 0), (8, 4, 0), (8, 6, 0)]
    for depth, kind, interlace in odd:
        data = picture(header(8, 8, depth, kind, interlace), bytes(2000))
        label = f"PNG of depth {depth}, kind {kind}"
        cases.append(Case("shape", label, _with_image(data), "refused"))
    for depth, kind, interlace in [(3, 2, 0), (0, 2, 0), (255, 2, 0), (8, 7, 0), (8, 2, 9)]:
        data = picture(header(8, 8, depth, kind, interlace), bytes(2000))
        cases.append(Case("shape", f"no PNG: {depth}, {kind}, {interlace}", _with_image(data)))
    return cases


def _bombs() -> list[Case]:
    zeros = bytes(40_000_000)
    jpeg = many_scans(1024, 4000)
    pictures = {
        **picture_bombs(zeros), "zeros": zeros, "an image and zeros": png(PIXELS[1]) + zeros,
        "a zip": archive([Entry(b"a.png", archive(entries()))]),
        "a zip of zeros": archive([Entry(b"a.png", zeros, DEFLATED)]),
        "a JPEG of 4,000 scans": jpeg,
    }  # fmt: skip
    cases = [
        Case("bomb", f"{name} as image {at}", _with_image(data, at, NAMES[at]))
        for name, data in pictures.items()
        for at in (0, 1)
    ]
    # The first image sets the size, and so how many bytes the others may have.
    large = header(4096, 4096)
    declared = picture(large, bytes(4096))
    header_only = [
        Entry(NAMES[0], declared, DEFLATED),
        Entry(NAMES[1], bytes(300_000_000), DEFLATED),
    ]
    cases.append(Case("bomb", "a large header, then zeros", archive(header_only), "refused"))
    first = _with_image(picture(large, bytes(4096 * 12289)), 0, NAMES[0])
    cases.append(Case("bomb", "one large image among small ones", first, "refused"))
    for side in (4097, 8192):
        rows = bytes(side * (3 * side + 1) if side < 5000 else 10_000_000)
        alone = archive([Entry(NAMES[0], picture(header(side, side), rows), DEFLATED)])
        cases.append(Case("bomb", f"a single image of {side} x {side}", alone, "refused"))
    scans = archive([Entry(NAMES[0], jpeg, DEFLATED), Entry(NAMES[1], jpeg, DEFLATED)])
    cases.append(Case("bomb", "JPEGs of 4,000 scans", scans, "refused"))
    spaces = changed(entries(), 3, data=b'{"labels": null}' + b" " * 40_000_000)
    cases.append(Case("bomb", "an index of spaces", archive(spaces), "refused"))
    many = [Entry(b"%05d.txt" % i, b"") for i in range(20_000)]
    cases.append(Case("bomb", "20,000 other files", archive([*entries(), *many]), "valid"))
    same = [Entry(b"%05d.png" % i, png(PIXELS[0])) for i in range(3000)]
    cases.append(Case("bomb", "3,000 images", archive(same), "valid"))
    return cases


def _names() -> list[Case]:
    cases = []
    for name in OUTSIDE:
        content = archive([*entries(), Entry(name.encode(), png(PIXELS[0]))])
        cases.append(Case("path", f"{name!r} behind", content, "refused"))
        content = archive(changed(entries(), 0, name=name.encode()))
        cases.append(Case("path", f"{name!r} in front", content, "refused"))
    for name in ODD_NAMES:
        encoded, utf8 = name.encode("utf-8"), {"flags": 0x800}
        extra = Entry(encoded, png(PIXELS[0]), local=utf8, central=utf8)
        cases.append(Case("path", f"odd {name[:20]!r} behind", archive([*entries(), extra])))
        only = archive([extra])
        cases.append(Case("path", f"odd {name[:20]!r} alone", only))
    utf8 = {"flags": 0x800}
    broken = Entry(b"\xff\xfe.png", png(PIXELS[0]), local=utf8, central=utf8)
    cases.append(Case("path", "no UTF-8", archive([*entries(), broken])))
    link = {"external": 0o120777 << 16}
    to_password = Entry(b"link.png", b"/etc/passwd", central=link)
    cases.append(Case("path", "a link", archive([*entries(), to_password]), "refused"))
    twice = [*entries(), entries()[0]]
    cases.append(Case("path", "twice the same name", archive(twice), "refused"))
    return cases


def _folder(links: dict[str, str], pipe: str = "") -> object:
    def make(path: Path) -> None:
        (path / "0").mkdir(parents=True)
        for i in range(3):
            (path / "0" / f"{i}.png").write_bytes(png(PIXELS[i]))
        for name, target in links.items():
            (path / name).symlink_to(target)
        if pipe:
            os.mkfifo(path / pipe)

    return make


def _folders() -> list[Case]:
    bad = {
        "a link to a file outside": {"a.png": "/etc/passwd"},
        "a link to a device": {"a.png": "/dev/zero"},
        "a link to the parent": {"a": ".."},
        "a link to the root": {"a": "/"},
        "a link to itself": {"a.png": "a.png"},
        "a link to nothing": {"a.png": "absent.png"},
        "a link to a folder inside": {"a": "0"},
        "a link to itself as index": {"dataset.json": "dataset.json"},
        "an index outside": {"dataset.json": "/etc/passwd"},
        "an index without end": {"dataset.json": "/dev/zero"},
        "a ring": {"a": "b", "b": "a"},
    }
    cases = [Case("folder", name, _folder(links), "refused") for name, links in bad.items()]  # type: ignore[arg-type]
    whole = {
        "a link inside": _folder({"a.png": "0/0.png"}),
        "a pipe": _folder({}, "a.png"),
        "a pipe as index": _folder({}, "dataset.json"),
        "whole": _folder({}),
    }
    cases += [Case("folder", name, make, "valid") for name, make in whole.items()]  # type: ignore[arg-type]
    places = {"an empty folder": Path.mkdir, "a pipe alone": os.mkfifo, "nothing": lambda p: None}
    places["a device"] = lambda p: p.symlink_to("/dev/zero")
    cases += [Case("folder", name, make, "refused") for name, make in places.items()]
    return cases


def cases() -> list[Case]:
    valid, stored = archive(entries()), archive(entries(0))
    index = valid.index(b"PK\1\2")
    hot = [(0, 60), (index, len(valid)), (len(valid) - 22, len(valid))]
    pictures = [
        Case(f"image {c.kind}", c.name, _with_image(c.content), c.expected)  # type: ignore[arg-type]
        for c in damaged(png(PIXELS[1]), seed=4, hot=[(0, 60)])
        if c.kind in ("flip", "cut", "foreign")
    ]
    other = [Case("valid", "stored", stored, "valid")]
    return [
        *damaged(valid, seed=3, hot=hot), *other, *pictures, *lies(entries(), 1),
        *false_indices(entries()), *_shapes(), *_bombs(), *_names(), *_folders(),
    ]  # fmt: skip


def read(path: Path) -> None:
    """Opens the dataset and decodes up to 64 of its images."""
    dataset = open_dataset(path)
    assert 0 < len(dataset) <= 20_000 and 0 < dataset.resolution <= 4096
    assert dataset.channels in (1, 3) and 0 <= dataset.label_dim <= 1 << 20
    assert dataset.labels is None or len(dataset.labels) == len(dataset)
    images = dataset.images(np.arange(min(64, len(dataset))))
    assert images.dtype == np.uint8 and images.shape[2:] == (dataset.resolution,) * 2
    json.dumps(dataset.provenance())


SUITE = Suite("dataset zip", "data.zip", cases, read)


def test_dataset_zip() -> None:
    assert_harmless(Path(__file__).stem)
