"""Network files: the safetensors header, the metadata in it, and the network built from them."""

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fastgan.checkpoint.network_file import load_network_file, network_from_file
from fastgan.common.noise import seeded
from fastgan.models import network_from_config
from tests.hostile.damage import damaged, each, listed, places
from tests.hostile.harness import Case, Suite

CONFIG = {
    "precond": "EDMPrecond", "img_resolution": 8, "img_channels": 1, "label_dim": 3,
    "model_type": "DhariwalUNet", "model_channels": 4, "channel_mult": [1], "num_blocks": 1,
    "attn_resolutions": [],
}  # fmt: skip
METADATA = {
    "format": "fastgan-network", "version": "1", "kind": "ema", "config": json.dumps(CONFIG),
    "nimg": "2000", "label_dim": "3", "sigma_init": "80", "base_model": "edm",
    "base_sha256": "0" * 64, "license": "CC-BY-NC-SA-4.0", "provenance": '{"base": {"n": [1]}}',
}  # fmt: skip
HUGE, NAN = 10**30, float("nan")
OTHER_CONFIGS: dict[str, list[Any]] = {
    "precond": [None, 1, "", "VPPrecond", {}, "__import__"], "num_blocks": [0, -1, 2, 65, 10**9,
    HUGE, "1", None, 1.0, [1], True], "img_resolution": [0, -8, 7.5, "8", None, 1 << 40, HUGE, NAN],
    "img_channels": [0, "1", 1.0, 1 << 20, True], "label_dim": [-1, "3", 3.0, 1 << 40, 4],
    "model_type": [None, "UNet", "SongUNet", [], 3], "model_channels": [0, -4, 1, 3, "4", 1 << 20],
    "channel_mult": [[], 1, "1", [0], [1.5], ["1"], [1] * 10_000, [HUGE], [[1]], {"1": 1}, [1, 1]],
    "attn_resolutions": [None, 8, [8], ["8"], [0.5], [8] * 10_000, {"8": 1}, "8"],
    "dropout": ["x", NAN], "sigma_min": ["0", NAN, -1, 1e400, HUGE], "sigma_max": [NAN, -1],
    "sigma_data": [0, "0.5", NAN, 1e400, [0.5]], "augment_dim": [-1, "9", 9],
    "channel_mult_emb": [0, 1 << 40, 3], "resample_filter": [[], [0], "11", [0, 0], [NAN]],
    "embedding_type": ["fourier", None, []],
    "self": [1], "in_channels": [1], "": [1], "x" * 5000: [1], "\x1b[31m": [1],
}  # fmt: skip
TEXTS: dict[str, list[str]] = {
    "format": ["", "fastgan", "FASTGAN-NETWORK", "x" * 100_000],
    "version": ["", "0", "2", "1.0", "01", "1 ", "9" * 5000, "\x1b[2J"],
    "nimg": ["", "-1", "1.5", "1e3", " 1", "9" * 19, "9" * 5000, "\u0661", "NaN"],
    "config": [
        "", "[]", "{}", "[" * 100_000, '{"a":' * 5000, "{} {}", '{"precond": ' + "9" * 5000 + "}",
        " " * 2_000_000 + "{}", '{"a": NaN}', "\0", '{"model_type": "\\ud800"}',
        '{"precond": "\\u001b[31m"}', '{"channel_mult": ' + "[" * 900 + "]" * 900 + "}",
    ],
    "provenance": ["", "[]", "[" * 100_000, '{"a":' * 990 + "1" + "}" * 990, "9" * 5000,
                   " " * 2_000_000 + "{}"],
}  # fmt: skip
# May be read, and must then do no harm where they are written into another network file.
PROVENANCES = [
    '{"a":' * 400 + "1" + "}" * 400, '{"a": "\\ud800"}', '{"a": ' + "9" * 4000 + "}",
    '{"base_model": [1]}', '{"license": {"a": 1}}', '{"a": 1, "a": 2}', '{"": NaN}', '{"base": 3}',
    '{"a": "\\u001b[2J"}', '{"a": "' + "x" * 1_000_000 + '"}',
]  # fmt: skip
DTYPES = ["F64", "I32", "BOOL", "C64", "O", "", "f32", None, 3, "F4"]
SHAPES: list[Any] = [
    None, 4, [], [-4], [4.0], ["4"], [2**62, 4], [0], [0, 2**60], [1] * 64, [4, 1], [2**64], [5],
]  # fmt: skip
OFFSETS: list[Any] = [
    None, [], [0, 16, 32], [16, 0], [-1, 15], [1, 17], [0, 2**63], [2**64, 1], ["0", "16"],
    [0.0, 16.0], [8, 24], [0, 15],
]  # fmt: skip
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
ENTRIES: list[Any] = [None, 3, [], {}, {"dtype": "F32"}]
ENTRIES += [{**ENTRY, "dtype": d} for d in DTYPES] + [{**ENTRY, "shape": s} for s in SHAPES]
ENTRIES += [{**ENTRY, "data_offsets": o} for o in OFFSETS]


@cache
def state() -> dict[str, torch.Tensor]:
    with seeded(0):
        return network_from_config(CONFIG).state_dict()


def packed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@cache
def split() -> tuple[dict[str, Any], bytes]:
    """The header and the data of a sound file."""
    whole = save(state(), METADATA)
    (length,) = struct.unpack_from("<Q", whole)
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def edited(**entries: Any) -> bytes:
    header, data = split()
    # safetensors orders the metadata differently in every process.
    return packed(json.dumps({**header, **entries}, sort_keys=True).encode(), data)


def with_metadata(**changes: Any) -> bytes:
    merged = {**METADATA, **changes}
    return edited(__metadata__={key: v for key, v in merged.items() if v is not None})


def _metadata() -> list[Case]:
    found = []
    changes = [{key: value} for key, values in OTHER_CONFIGS.items() for value in values]
    for key, texts in TEXTS.items():
        found += each(f"metadata {key}", texts, lambda text, k=key: with_metadata(**{k: text}))  # type: ignore[misc]
    keys = ("format", "version", "kind", "config", "nimg", "license", "provenance")
    without = [json.dumps({k: v for k, v in CONFIG.items() if k != key}) for key in CONFIG]
    return [
        *found,
        *each("config", changes, lambda c: with_metadata(config=json.dumps({**CONFIG, **c})), None),
        *each("incomplete", without, lambda text: with_metadata(config=text), None),
        *each("provenance", PROVENANCES, lambda text: with_metadata(provenance=text), None),
        *each("without", keys, lambda key: with_metadata(**{key: None})),
        *each("not a text", keys, lambda key: with_metadata(**{key: 3})),
        *each("metadata", (None, [], "x", {"a": {}}), lambda v: edited(__metadata__=v)),
        *each("license", ["x" * 500_000], lambda text: with_metadata(license=text), None),
    ]


def _headers() -> list[Case]:
    header, data = split()
    text, first = json.dumps(header).encode(), next(n for n in header if n != "__metadata__")
    tensors = {n: e for n, e in header.items() if n != "__metadata__"}
    overlapping = {n: {**e, "data_offsets": [0, 16]} for n, e in tensors.items()}
    empty = {f"x{i}": {**ENTRY, "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    headers = {
        "overlapping tensors": json.dumps(header | overlapping).encode(),
        "no tensors": json.dumps({"__metadata__": METADATA}).encode(), "a list": b"[]",
        "no metadata": json.dumps(tensors).encode(), "lists": b"[" * 50_000, "null": b"null",
        "not UTF-8": text.replace(b"edm", b"\xff\xfe\xfd"), "cut": text[:-30],
        "deep": b'{"a":' * 10_000, "NaN": text.replace(b"[4]", b"[NaN]"), "spaces": b" " * 50_000,
        "a name of 50,000 characters": text.replace(first.encode(), b"x" * 50_000),
        "a name that commands": text.replace(first.encode(), b"\\u001b[31m\\u0007\\n"),
        "a name that leaves": text.replace(first.encode(), b"../../../../etc/passwd"),
        "50,000 tensors": json.dumps({"__metadata__": METADATA, **empty}).encode(),
    }  # fmt: skip
    twice = [b', "__metadata__": {}}', f', "{first}": {json.dumps(header[first])}}}'.encode()]
    lengths = (0, 1, len(text) - 8, len(text) + 8, 2**20, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
    alone = [json.dumps({"__metadata__": METADATA, first: entry}) for entry in ENTRIES]
    return [
        *each("entry", ENTRIES, lambda entry: edited(**{first: entry})),
        *each("entry alone", alone, lambda head: packed(head.encode(), bytes(16))),
        *each("length", lengths, lambda length: packed(text, data, length)),
        *each("twice", twice, lambda more: packed(text[:-1] + more, data), None),
        *listed("header", {name: packed(head, data) for name, head in headers.items()}),
        *listed("data", {"more": packed(text, data + bytes(8)), "none": packed(text, b"")}),
    ]


def _stored(dtype: torch.dtype, factor: float = 1) -> bytes:
    return save({k: (v * factor).to(dtype) for k, v in state().items()}, METADATA)


def cases() -> list[Case]:
    whole = edited()
    (length,) = struct.unpack_from("<Q", whole)
    hot = [(0, 16), (8, length), (8, 8 + len(json.dumps(METADATA)))]
    floats = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
    others = (torch.int64, torch.bool, torch.uint8, torch.complex64)
    return [
        *damaged(whole, seed=8, hot=hot),
        *_metadata(),
        *_headers(),
        *each("dtype", others, _stored),
        *each("float", floats, _stored, "valid"),
        Case("float", "NaN", _stored(torch.float32, NAN)),
        *places(),
    ]


def read(path: Path) -> None:
    """Builds the network, runs it once, and prepares metadata for a network made from it."""
    file = load_network_file(path)
    assert 0 <= file.nimg < 10**18
    assert len(json.dumps({"base": [file.provenance_of_derived()]})) < 1 << 22
    network = network_from_file(path).eval()
    assert all(p.dtype == torch.float32 and not p.is_meta for p in network.parameters())
    channels, side = network.model.img_channels, network.model.img_resolution
    assert 0 < channels <= 64 and 0 < side <= 64
    with torch.no_grad():
        image = network(torch.ones(1, channels, side, side), torch.ones(1))
    assert image.shape == (1, channels, side, side)


SUITE = Suite("safetensors", "net.safetensors", cases, read)
