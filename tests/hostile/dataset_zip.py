"""Dataset zips, and folders in their place: archives, names, pictures that look like some."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fastgan.data import open_dataset
from tests.hostile.damage import damaged, each, listed, places, png_chunk
from tests.hostile.harness import Case, Suite
from tests.hostile.zips import DEFLATED, Entry, archive, changed, lies

PIXELS = np.random.default_rng(3).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
NAMES = [b"00000/img00000000.png", b"00000/img00000001.png", b"00000/img00000002.png"]
OUTSIDE = [
    "../a.png", "x/../../a.png", "/a.png", "//a.png", "/etc/a.png", "..\\a.png", "C:/a.png",
    "C:a.png", "c:\\a.png", "\\\\host\\a.png", "a/..", "./../a.png", "~/../a.png", "..",
    "/proc/self/mem.png", "x:y/a.png", "a\\..\\b.png",
]  # fmt: skip
ODD_NAMES = [
    "", ".", "./", "./.", "a.png/", ".png", "..png", "a\0b.png", "a\x1b[31m.png", "a\nb.png",
    "a\r\nerror: b.png", "a\u202egnp.png", "a.png ", "a.PNG", "a" * 30_000 + ".png",
    "a/" * 2000 + "a.png", "__MACOSX/a.png", ".hidden/a.png", "dataset.json/a.png",
    "x/dataset.json", "DATASET.JSON", "0/" * 100 + "dataset.json",
]  # fmt: skip
SIZES = [
    (0, 0), (0, 8), (8, 0), (1, 1), (8, 9), (2**31 - 1, 1), (4097, 4097), (2**31 - 1, 2**31 - 1),
    (2**32 - 1, 2**32 - 1), (8192, 8192), (65_535, 1024),
]  # fmt: skip
# Depth, kind and interlace of PNGs that are none of ours, and of none at all.
ODD_PNGS = [(16, 2, 0), (16, 0, 0), (1, 0, 0), (4, 3, 0), (8, 4, 0), (8, 6, 0)]
NO_PNGS = [(3, 2, 0), (0, 2, 0), (255, 2, 0), (8, 7, 0), (8, 2, 9)]
LINKS = {
    "to a file outside": {"a.png": "/etc/passwd"}, "to a device": {"a.png": "/dev/zero"},
    "to the parent": {"a": ".."}, "to the root": {"a": "/"}, "to itself": {"a.png": "a.png"},
    "to nothing": {"a.png": "absent.png"}, "to a folder inside": {"a": "0"},
    "an index outside": {"dataset.json": "/etc/passwd"}, "a ring": {"a": "b", "b": "a"},
    "an index without end": {"dataset.json": "/dev/zero"},
}  # fmt: skip


def png(pixels: np.ndarray) -> bytes:
    return encoded(pixels, "PNG")


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def header(width: int, height: int, depth: int = 8, kind: int = 2, interlace: int = 0) -> bytes:
    fields = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", fields)


def picture(header: bytes, rows: bytes, *chunks: bytes) -> bytes:
    end = png_chunk(b"IEND", b"")
    return header + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows, 1)) + end


def large_webp(side: int) -> bytes:
    """A WebP's headers with a large canvas, around a small picture."""
    size = struct.pack("<I", side - 1)[:3] * 2
    small = encoded(PIXELS[0], "WEBP", lossless=True)[12:]
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    frame = struct.pack("<I", 0)[:3] * 2 + b"\x07\0\0" * 2 + b"\x01\0\0\0"
    animated = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    animated += b"ANMF" + struct.pack("<I", len(frame) + len(small)) + frame + small
    body = b"WEBP" + canvas + animated
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan occurs again and again: each takes a pass over it."""
    whole = encoded(np.zeros((side, side, 3), np.uint8), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + b"\xff\xd9"


@cache
def picture_bombs() -> dict[str, bytes]:
    """Files of 8 x 8 pixels or of a huge size, much work for few bytes."""
    zeros = bytes(40_000_000)
    packed, rows, small = zlib.compress(zeros, 1), bytes(8 * 25), header(8, 8)
    text = png_chunk(b"zTXt", b"k\0\0" + packed)
    jpeg = bytearray(encoded(PIXELS[0], "JPEG"))
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 10_000, 10_000)
    bitmap = bytearray(encoded(PIXELS[0], "BMP"))
    struct.pack_into("<ii", bitmap, 18, 10_000, 10_000)
    plays = png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    frame = png_chunk(b"fcTL", struct.pack(">5I2H2B", 0, 8, 8, 0, 0, 1, 1, 0, 0))
    return {
        "rows without end": small + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b""),
        "the largest WebP": large_webp(16_383), "a JPEG of 4,000 scans": many_scans(1024, 4000),
        "a large JPEG": bytes(jpeg), "a large bitmap": bytes(bitmap), "zeros": zeros,
        "compressed text": picture(small, rows, text), "an image and zeros": png(PIXELS[1]) + zeros,
        "a compressed profile": picture(small, rows, png_chunk(b"iCCP", b"k\0\0" + packed)),
        "international text": picture(small, rows, png_chunk(b"iTXt", b"k\0\1\0\0\0" + packed)),
        "500 compressed texts": picture(small, rows, *[text[:100_000]] * 500),
        "50,000 empty chunks": picture(small, rows, *[png_chunk(b"tEXt", b"a\0b")] * 50_000),
        "an animation": picture(small, rows, plays, frame),
        "a zip": archive([Entry(b"a.png", archive(entries()))]),
    }  # fmt: skip


@cache
def entries(method: int = DEFLATED) -> list[Entry]:
    index = {"labels": [[name.decode(), i] for i, name in enumerate(NAMES)]}
    images = [Entry(name, png(p), method) for name, p in zip(NAMES, PIXELS, strict=True)]
    return [*images, Entry(b"dataset.json", json.dumps(index).encode(), method)]


def _with_image(data: bytes, at: int = 1) -> bytes:
    return archive(changed(entries(), at, data=data))


def _pictures() -> list[Case]:
    def of(rows: int) -> Callable[..., bytes]:
        return lambda sides: _with_image(picture(header(*sides), bytes(rows)))

    bombs = picture_bombs()
    one = [
        Case(f"image {c.kind}", c.name, _with_image(c.content), c.expected)  # type: ignore[arg-type]
        for c in damaged(png(PIXELS[1]), seed=4, hot=[(0, 60)])
        if c.kind in ("flip", "cut", "foreign")
    ]
    return [
        *one,
        *each("size", SIZES, of(100_000)),
        *each("size of all", SIZES, lambda s: _with_image(picture(header(*s), bytes(9999)), 0)),
        *each("mode", [(8, 8, *mode) for mode in ODD_PNGS], of(2000)),
        *each("no PNG", [(8, 8, *mode) for mode in NO_PNGS], of(2000), None),
        *each("bomb", bombs, lambda name: _with_image(bombs[name]), None),
        *each("bomb first", bombs, lambda name: _with_image(bombs[name], 0), None),
    ]


def _bombs() -> list[Case]:
    # The first image sets the size, and so how many bytes the others may have.
    large, jpeg = header(4096, 4096), picture_bombs()["a JPEG of 4,000 scans"]
    declared = Entry(NAMES[0], picture(large, bytes(4096)), DEFLATED)
    wrong = {
        "a large header, then zeros": [declared, Entry(NAMES[1], bytes(100_000_000), DEFLATED)],
        "one large image among small ones": changed(
            entries(), 0, data=picture(large, bytes(4096 * 12289))
        ),
        "an image of 4097": [Entry(NAMES[0], picture(header(4097, 4097), bytes(9999)), DEFLATED)],
        "JPEGs of 4,000 scans": [Entry(name, jpeg, DEFLATED) for name in NAMES],
        "an index of spaces": changed(entries(), 3, data=b'{"labels": null}' + b" " * 40_000_000),
        "twice the same name": [*entries(), entries()[0]],
        "a link": [*entries(), Entry(b"a.png", b"/etc", central={"external": 0o120777 << 16})],
    }
    whole = {
        "20,000 other files": [*entries(), *(Entry(b"%05d.txt" % i, b"") for i in range(20_000))],
        "3,000 images": [Entry(b"%05d.png" % i, png(PIXELS[0])) for i in range(3000)],
        "stored": entries(0),
    }
    return [
        *listed("contents", {name: archive(found) for name, found in wrong.items()}),
        *listed("valid", {name: archive(found) for name, found in whole.items()}, "valid"),
    ]


def _with_name(name: str) -> bytes:
    utf8 = {"flags": 0x800}
    return archive([*entries(), Entry(name.encode(), png(PIXELS[0]), local=utf8, central=utf8)])


def _folder(links: dict[str, str], pipe: str = "") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / "0").mkdir(parents=True)
        for i in range(3):
            (path / "0" / f"{i}.png").write_bytes(png(PIXELS[i]))
        for name, target in links.items():
            (path / name).symlink_to(target)
        if pipe:
            os.mkfifo(path / pipe)

    return make


def cases() -> list[Case]:
    valid = archive(entries())
    hot = [(0, 60), (valid.index(b"PK\1\2"), len(valid)), (len(valid) - 22, len(valid))]
    sound = {
        "a link inside": _folder({"a.png": "0/0.png"}), "a pipe": _folder({}, "a.png"),
        "a pipe as index": _folder({}, "dataset.json"), "whole": _folder({}),
    }  # fmt: skip
    return [
        *damaged(valid, seed=3, hot=hot), *_pictures(), *lies(entries(), 1), *_bombs(),
        *each("path behind", OUTSIDE, _with_name),
        *each("path", OUTSIDE, lambda n: archive(changed(entries(), 0, name=n.encode()))),
        *each("odd path", ODD_NAMES, _with_name, None),
        *(Case("link", name, _folder(links), "refused") for name, links in LINKS.items()),
        *(Case("folder", name, make, "valid") for name, make in sound.items()),
        *places(),
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
