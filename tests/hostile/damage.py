"""What accidents and simple-minded malice do to a valid file, the same for every format."""

import gzip
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from tests.hostile.harness import Case, Ending

T = TypeVar("T")


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
    for number in range(110):
        content, places = bytearray(valid), [place() for _ in range(1 if number < 90 else 8)]
        for at in places:
            content[at] ^= 1 << dice.randrange(8)
        cases.append(Case("flip", f"{number}: at {places}", bytes(content)))
    cuts = {1, 2, 4, 8, 9, 30, len(valid) - 1, len(valid) - 2, *(place() for _ in range(60))}
    cases += [Case("cut", f"after {n}", valid[:n]) for n in sorted(cuts) if 0 < n < len(valid)]
    heads = sorted({1, 2, 8, *(place() for _ in range(6))} - {0})
    cases += [Case("cut", f"the first {n} away", valid[n:]) for n in heads]
    for number in range(12):
        at, other, length = place(), place(), dice.choice((1, 2, 4, 8, 64))
        noise = dice.choice((bytes(length), b"\xff" * length, dice.randbytes(length)))
        low, high = sorted((at, other))
        changes = {
            "insert": valid[:at] + noise + valid[at:],
            "delete": valid[:at] + valid[at + length :],
            "overwrite": valid[:at] + noise + valid[at + length :],
            "splice": valid[:at] + valid[other : other + 64] + valid[at:],
            "exchange": valid[:low] + valid[high:] + valid[low:high],
            "append": valid + noise,
        }
        cases += [Case(k, f"{number}: {length} at {at}", c) for k, c in changes.items()]
    return distinct([*cases, *_foreign(valid)])


def _foreign(valid: bytes) -> list[Case]:
    """Files of another kind under this name."""
    files = {
        "empty": b"", "one zero byte": b"\0", "zeros": bytes(4096), "ones": b"\xff" * 4096,
        "newlines": b"\n" * 4096, "spaces": b" " * 4096, "text": b"hello, world\n",
        "UTF-16": "hello, world".encode("utf-16"), "NUL in text": b"abc\0def\n",
        "not UTF-8": b"\xc3\x28\xa0\xa1 \xf0\x28\x8c\x28",
        "html": b"<!DOCTYPE html><html><title>404: not found</title></html>",
        "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "script": b"#!/bin/sh\ntouch executed\n", "ELF": b"\x7fELF\x02\x01\x01" + bytes(57),
        "python": b"import os\nos.system('touch executed')\n",
        "PNG": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", b"\0\0\0\1\0\0\0\1\x08\2\0\0\0")
        + png_chunk(b"IDAT", zlib.compress(bytes(4))) + png_chunk(b"IEND", b""),
        "JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00\xff\xd9",
        "gzip of the file": gzip.compress(valid, mtime=0),
        "zlib of the file": zlib.compress(valid), "empty zip": b"PK\x05\x06" + bytes(18),
        "zip64 end alone": b"PK\x06\x06" + bytes(52) + b"PK\x06\x07" + bytes(16)
        + b"PK\x05\x06" + b"\xff" * 16 + bytes(2),
        "numpy array": b"\x93NUMPY\x01\x00v\x00" + b" " * 118,
        "pickle that runs": b"\x80\x04cposix\nsystem\nX\x0e\x00\x00\x00touch executed\x85R.",
        "pickle, protocol 0": b"cos\nsystem\n(S'touch executed'\ntR.",
        "tar": b"a.png" + bytes(95) + b"0000644\0" + bytes(404), "the file twice": valid + valid,
        "the file backwards": valid[::-1], "the file in hexadecimal": valid.hex().encode(),
    }  # fmt: skip
    return listed("foreign", files, None)


def places(nothing: Ending = "refused", **others: Ending) -> list[Case]:
    """What is no file where one is looked for; how a folder or a pipe ends may be given."""
    made: dict[str, Callable[[Path], None]] = {
        "folder": Path.mkdir, "pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"),
        "nothing": lambda p: None,
    }  # fmt: skip
    ends = {"nothing": nothing, **others}
    return [Case("place", name, make, ends.get(name, "refused")) for name, make in made.items()]


def each(
    kind: str, inputs: Iterable[T], made: Callable[[T], bytes], ending: Ending | None = "refused"
) -> list[Case]:
    """Cases of one kind that end alike, named by what they are made from, once they are wanted."""

    def put(given: T, path: Path) -> None:
        path.write_bytes(made(given))

    def short(given: T) -> str:
        return f"{given[:40] if isinstance(given, str | bytes) else str(given)[:40]!a}"

    return [
        Case(kind, f"{i}: {short(given)}", partial(put, given), ending)
        for i, given in enumerate(inputs)
    ]


def listed(kind: str, contents: dict[str, bytes], ending: Ending | None = "refused") -> list[Case]:
    """Cases of one kind that end alike, by name."""
    return [Case(kind, name, content, ending) for name, content in contents.items()]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def distinct(cases: Iterable[Case]) -> list[Case]:
    """Without repetitions: each content counts once."""
    seen: dict[object, Case] = {}
    for case in cases:
        seen.setdefault(case.content, case)
    return list(seen.values())
