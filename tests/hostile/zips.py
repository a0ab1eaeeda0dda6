"""Zip archives that lie: every field of every record under the attacker's hand.

Records as in PKWARE's APPNOTE: a local header (PK 3 4) before each entry's data, a central header
(PK 1 2) for each entry behind them, and the end record (PK 5 6).
"""

import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from tests.hostile.damage import each, listed
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
        packer = zlib.compressobj(1, wbits=-15)
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
    *(("flags", n) for n in (0x1, 0x41, 0x2000, 0x8, 0x20)),
    *(("method", n) for n in (1, 9, 12, 14, 93, 99, 65535)), ("version", 65535),
    ("crc", 0), ("crc", 0xFFFFFFFF), ("date", 0), ("date", 65535), ("time", 65535),
    *((name, n) for name in ("size", "packed") for n in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)),
    ("name", b""), ("name", b"x" * 65535), ("extra", b"\xff" * 100), ("extra", b"\1\0"),
    ("extra", b"\1\0\x18\0" + b"\xff" * 24),
]  # fmt: skip
_CENTRAL_LIES: list[tuple[str, Any]] = [
    *(("offset", n) for n in (1, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)), ("made_by", 65535),
    ("disk", 1), ("comment", b"x" * 65535), ("external", 0o120777 << 16), ("external", 0x10),
]  # fmt: skip
_END_LIES = [
    *(("count", n) for n in (0, 1, 65535)), ("here", 65535), ("disk", 1), ("start", 65535),
    *((name, n) for name in ("bytes", "offset") for n in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)),
    ("comment", 1), ("comment", 65535),
]  # fmt: skip


def lies(entries: list[Entry], at: int) -> list[Case]:
    """False headers of the entry number `at`, false end records, archives put together wrongly."""
    headers = [
        {where: {name: value} for where in both}
        for name, value in _LIES
        for both in (("local",), ("central",), ("local", "central"))
    ]
    headers += [{"central": {name: value}} for name, value in _CENTRAL_LIES]
    return [
        *each("header", headers, lambda h: archive(changed(entries, at, **h)), None),
        *each("end", _END_LIES, lambda lie: archive(entries, **dict([lie])), None),
        *_false_indices(entries),
    ]


def _false_indices(entries: list[Entry]) -> list[Case]:
    whole = archive(entries)
    end = whole[-22:]
    zip64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *[2**63 - 1] * 4)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(whole) - 22, 1)
    far = struct.pack("<4sIQI", b"PK\6\7", 0, 2**64 - 1, 1)
    all_ones = b"PK\5\6" + b"\xff" * 16 + b"\0\0"
    overlapping = [replace(e, central={**e.central, "offset": 0}) for e in entries]
    either = {
        "text in front": b"#!/bin/sh\n" * 50 + whole, "two archives": whole + whole,
        "an end record twice": whole + end, "index inside an entry": archive(entries, offset=10),
        "index alone": whole[whole.index(b"PK\1\2") :],
    }  # fmt: skip
    wrong = {
        "text behind": whole + b"x" * 70_000, "end record alone": end, "no entries": archive([]),
        "zip64 counts of 2^63": whole[:-22] + zip64 + locator + all_ones,
        "zip64 far away": whole[:-22] + far + all_ones,
        "zip64 without a record": whole[:-22] + locator + all_ones,
        "all entries at one place": archive(overlapping),
    }  # fmt: skip
    right = {
        "a comment of 65,535 bytes": archive(entries, suffix=b"x" * 65535, comment=65535),
        "a prefix": archive(entries, prefix=b"x" * 1000),
    }
    return [*listed("index", either, None), *listed("index", wrong), *listed("odd", right, "valid")]
