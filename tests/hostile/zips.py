"""Zip archives that lie: every field of every record under the attacker's hand.

Records as in PKWARE's APPNOTE: a local header (PK 3 4) before each entry's data, a central header
(PK 1 2) for each entry behind them, and the end record (PK 5 6).
"""

import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from tests.hostile.harness import Case

STORED, DEFLATED = 0, 8
_LOCAL, _CENTRAL, _END = "<4s5H3I2H", "<4s6H3I5H2I", "<4s4H2IH"


@dataclass(frozen=True)
class Entry:
    """One entry; `local` and `central` replace the fields of its two headers by name."""

    name: bytes
    data: bytes
    method: int = STORED
    local: dict[str, Any] = field(default_factory=dict)
    central: dict[str, Any] = field(default_factory=dict)

    def packed(self) -> bytes:
        if self.method != DEFLATED:
            return self.data
        packer = zlib.compressobj(9, wbits=-15)
        return packer.compress(self.data) + packer.flush()


def archive(entries: list[Entry], prefix: bytes = b"", suffix: bytes = b"", **end: Any) -> bytes:
    """The zip of `entries`; `end` replaces fields of the end record."""
    body, index = bytearray(prefix), bytearray()
    for entry in entries:
        packed = entry.packed()
        fields = {
            "version": 20, "flags": 0, "method": entry.method, "time": 0, "date": 33,
            "crc": zlib.crc32(entry.data), "packed": len(packed), "size": len(entry.data),
            "name": entry.name, "extra": b"", "made_by": 0x314, "comment": b"", "disk": 0,
            "internal": 0, "external": 0o100644 << 16, "offset": len(body),
        }  # fmt: skip
        f = fields | entry.local
        body += struct.pack(
            _LOCAL, b"PK\3\4", f["version"], f["flags"], f["method"], f["time"], f["date"],
            f["crc"], f["packed"], f["size"], len(f["name"]), len(f["extra"]),
        )  # fmt: skip
        body += f["name"] + f["extra"] + packed
        f = fields | entry.central
        index += struct.pack(
            _CENTRAL, b"PK\1\2", f["made_by"], f["version"], f["flags"], f["method"], f["time"],
            f["date"], f["crc"], f["packed"], f["size"], len(f["name"]), len(f["extra"]),
            len(f["comment"]), f["disk"], f["internal"], f["external"], f["offset"],
        )  # fmt: skip
        index += f["name"] + f["extra"] + f["comment"]
    e = {"disk": 0, "start": 0, "here": len(entries), "count": len(entries)}
    e |= {"bytes": len(index), "offset": len(body), "comment": 0, **end}
    record = struct.pack(
        _END, b"PK\5\6", e["disk"], e["start"], e["here"], e["count"], e["bytes"], e["offset"],
        e["comment"],
    )  # fmt: skip
    return bytes(body + index) + record + suffix


def changed(entries: list[Entry], at: int, **changes: Any) -> list[Entry]:
    """The entries with fields of one replaced; local and central are added to."""
    entry = entries[at]
    for header in ("local", "central"):
        if header in changes:
            changes[header] = getattr(entry, header) | changes[header]
    return [*entries[:at], replace(entry, **changes), *entries[at + 1 :]]


# Field and value; each is set in one header alone, and in both.
_LIES: list[tuple[str, Any]] = [
    ("flags", 0x1), ("flags", 0x41), ("flags", 0x2000), ("flags", 0x8), ("flags", 0x20),
    *(("method", n) for n in (1, 2, 6, 9, 12, 14, 93, 95, 97, 98, 99, 255, 65535)),
    ("version", 255), ("version", 65535), ("crc", 0), ("crc", 0xFFFFFFFF),
    ("size", 0), ("size", 1), ("size", 0x7FFFFFFF), ("size", 0xFFFFFFFE), ("size", 0xFFFFFFFF),
    ("packed", 0), ("packed", 1), ("packed", 0x7FFFFFFF), ("packed", 0xFFFFFFFF),
    ("name", b""), ("name", b"x" * 65535), ("extra", b"\1\0"), ("extra",
    b"\1\0\x08\0" + b"\xff" * 8),
    ("extra", b"\1\0\x18\0" + b"\xff" * 24), ("extra", b"\xff" * 100), ("extra",
    b"\xff\xff\xff\xff"),
    ("time", 65535), ("date", 0), ("date", 65535),
]  # fmt: skip
_CENTRAL_LIES = [
    ("offset", 1), ("offset", 0x7FFFFFFF), ("offset", 0xFFFFFFFE), ("offset", 0xFFFFFFFF),
    ("disk", 1), ("disk", 65535), ("comment", b"x" * 65535), ("external", 0o120777 << 16),
    ("external", 0x10), ("external", 0xFFFFFFFF), ("made_by", 0), ("made_by", 65535),
]  # fmt: skip
_END_LIES = [
    ("count", 0), ("count", 1), ("count", 65535), ("here", 65535), ("bytes", 0), ("bytes", 1),
    ("bytes", 0x7FFFFFFF), ("bytes", 0xFFFFFFFF), ("offset", 0), ("offset", 1),
    ("offset", 0x7FFFFFFF), ("offset", 0xFFFFFFFF), ("comment", 1), ("comment", 65535),
    ("disk", 1), ("disk", 65535), ("start", 65535),
]  # fmt: skip


def lies(entries: list[Entry], at: int) -> list[Case]:
    """False headers of the entry number `at`, and false end records."""
    found = []
    for i, (name, value) in enumerate(_LIES):
        label = f"{name}={str(value)[:20]} of entry {at}"
        one = {name: value}
        for where in ({"local": one}, {"central": one}, {"local": one, "central": one}):
            content = archive(changed(entries, at, **where))
            found.append(Case("header", f"{i}: {label}, {' and '.join(where)}", content))
    for name, value in _CENTRAL_LIES:
        content = archive(changed(entries, at, central={name: value}))
        found.append(Case("header", f"{name}={str(value)[:20]} of entry {at}", content))
    for name, value in _END_LIES:
        found.append(Case("index", f"end {name}={value}", archive(entries, **{name: value})))
    return found


def false_indices(entries: list[Entry]) -> list[Case]:
    """Whole archives put together wrongly."""
    whole = archive(entries)
    end = whole[-22:]
    zip64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *[2**63 - 1] * 4)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(whole) - 22, 1)
    far = struct.pack("<4sIQI", b"PK\6\7", 0, 2**64 - 1, 1)
    all_ones = b"PK\5\6" + b"\xff" * 16 + b"\0\0"
    overlapping = [replace(e, central={**e.central, "offset": 0}) for e in entries]
    contents = {
        "text in front": (b"#!/bin/sh\n" * 50 + whole, None),
        "text behind": (whole + b"x" * 70_000, "refused"),
        "two archives": (whole + whole, None),
        "an end record twice": (whole + end, None),
        "end record alone": (end, "refused"),
        "index alone": (whole[whole.index(b"PK\1\2") :], None),
        "zip64 counts of 2^63": (whole[:-22] + zip64 + locator + all_ones, "refused"),
        "zip64 far away": (whole[:-22] + far + all_ones, "refused"),
        "zip64 without a record": (whole[:-22] + locator + all_ones, "refused"),
        "all entries at one place": (archive(overlapping), "refused"),
        "index inside an entry": (archive(entries, offset=10), None),
        "no entries": (archive([]), "refused"),
        "a comment of 65,535 bytes": (
            archive(entries, suffix=b"x" * 65535, comment=65535),
            "valid",
        ),
        "a prefix": (archive(entries, prefix=b"x" * 1000), "valid"),
    }
    return [Case("index", name, content, to) for name, (content, to) in contents.items()]  # type: ignore[arg-type]
