"""What accidents and simple-minded malice do to a valid file, the same for every format."""

import gzip
import random
import struct
import zlib
from collections.abc import Iterable, Sequence

from tests.hostile.harness import Case


def damaged(valid: bytes, seed: int, hot: Sequence[tuple[int, int]] = ()) -> list[Case]:
    """About 300 cases: the valid file itself, damaged copies, and files of other kinds.

    Half of the places lie in `hot`, the ranges [start, end) of headers and indices, where a change
    means most.
    """
    dice = random.Random(seed)

    def place() -> int:
        start, end = dice.choice(hot) if hot and dice.random() < 0.5 else (0, len(valid))
        return dice.randrange(start, min(end, len(valid)))

    cases = [Case("valid", "the file itself", valid, "valid")]
    cases += [_flipped(valid, i, [place()], dice) for i in range(90)]
    cases += [_flipped(valid, 90 + i, [place() for _ in range(8)], dice) for i in range(20)]
    cuts = {1, 2, 4, 8, 9, 30, len(valid) - 1, len(valid) - 2, *(place() for _ in range(60))}
    cases += [
        Case("cut", f"after {n} of {len(valid)}", valid[:n])
        for n in sorted(cuts)
        if 0 < n < len(valid)
    ]
    heads = sorted({1, 2, 8, *(place() for _ in range(6))} - {0})
    cases += [Case("cut", f"the first {n} away", valid[n:]) for n in heads]
    for number in range(12):
        cases += _stretches(valid, number, place, dice)
    return _distinct([*cases, *foreign(valid)])


def _flipped(valid: bytes, number: int, places: list[int], dice: random.Random) -> Case:
    content, bits = bytearray(valid), []
    for at in places:
        bit = dice.randrange(8)
        content[at] ^= 1 << bit
        bits.append(f"{at}.{bit}")
    return Case("flip", f"{number}: {' '.join(bits)}", bytes(content))


def _stretches(valid: bytes, number: int, place, dice: random.Random) -> list[Case]:  # type: ignore[no-untyped-def]
    """Some bytes inserted, deleted, overwritten, repeated elsewhere, exchanged."""
    at, other, length = place(), place(), dice.choice((1, 2, 4, 8, 64))
    noise = dice.choice((bytes(length), b"\xff" * length, dice.randbytes(length)))
    low, high = sorted((at, other))
    swapped = valid[:low] + valid[high:] + valid[low:high]
    where = f"{number}: {length} at {at}"
    return [
        Case("insert", where, valid[:at] + noise + valid[at:]),
        Case("delete", where, valid[:at] + valid[at + length :]),
        Case("overwrite", where, valid[:at] + noise + valid[at + length :]),
        Case(
            "splice", f"{where} from {other}", valid[:at] + valid[other : other + 64] + valid[at:]
        ),
        Case("splice", f"{number}: {low} and {high} exchanged", swapped),
        Case("append", f"{number}: {length}", valid + noise),
    ]


def foreign(valid: bytes) -> list[Case]:
    """Files of another kind under this name."""
    pixel = b"\0\0\0\0"
    files = {
        "empty": b"",
        "one zero byte": b"\0",
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "newlines": b"\n" * 4096,
        "spaces": b" " * 4096,
        "text": b"hello, world\n",
        "UTF-16": "hello, world".encode("utf-16"),
        "not UTF-8": b"\xc3\x28\xa0\xa1 \xf0\x28\x8c\x28",
        "NUL in text": b"abc\0def\n",
        "html": b"<!DOCTYPE html><html><title>404: not found</title></html>",
        "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "script": b"#!/bin/sh\ntouch executed\n",
        "python": b"import os\nos.system('touch executed')\n",
        "ELF": b"\x7fELF\x02\x01\x01" + bytes(57),
        "PNG": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0,
        0))
        + png_chunk(b"IDAT", zlib.compress(pixel)) + png_chunk(b"IEND", b""),
        "JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00\xff\xd9",
        "gzip of the file": gzip.compress(valid, mtime=0),
        "zlib of the file": zlib.compress(valid),
        "empty zip": b"PK\x05\x06" + bytes(18),
        "zip64 end alone": b"PK\x06\x06" + bytes(52) + b"PK\x06\x07" + bytes(16)
        + b"PK\x05\x06" + b"\xff" * 16 + bytes(2),
        "numpy array": b"\x93NUMPY\x01\x00v\x00" + b" " * 118,
        "pickle that runs": b"\x80\x04cposix\nsystem\nX\x0e\x00\x00\x00touch executed\x85R.",
        "pickle, protocol 0": b"cos\nsystem\n(S'touch executed'\ntR.",
        "tar": b"a.png" + bytes(95) + b"0000644\0" + bytes(404),
        "the file twice": valid + valid,
        "the file backwards": valid[::-1],
        "the file in hexadecimal": valid.hex().encode(),
    }  # fmt: skip
    return [Case("foreign", name, content) for name, content in files.items()]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def _distinct(cases: Iterable[Case]) -> list[Case]:
    """Without repetitions: each content counts once."""
    seen: dict[object, Case] = {}
    for case in cases:
        seen.setdefault(case.content, case)
    return list(seen.values())
