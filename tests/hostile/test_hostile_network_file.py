"""Network files: the safetensors header, the metadata in it, and the network built from them."""

import json
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fastgan.checkpoint.network_file import load_network_file, network_from_file
from fastgan.common.noise import seeded
from fastgan.models import network_from_config
from tests.hostile.damage import damaged
from tests.hostile.harness import Case, Suite, assert_harmless

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
HUGE = 10**30
OTHER_CONFIGS: dict[str, list[Any]] = {
    "precond": [None, 1, "", "VPPrecond", [], {}, "D2OPrecond ", "__import__"],
    "img_resolution": [0, -8, 7.5, "8", None, True, [8], 1 << 20, 1 << 40, HUGE, float("nan")],
    "img_channels": [0, -1, "1", None, 1.0, 1 << 20, 1 << 40, HUGE, True],
    "label_dim": [-1, "3", None, 3.0, 1 << 40, HUGE, [3], 4],
    "model_type": [None, "UNet", "SongUNet", [], "fastgan.models.Precond", 3],
    "model_channels": [0, -4, 1, 3, 4.0, "4", None, 1 << 20, 1 << 40, HUGE],
    "channel_mult": [[], 1, "1", None, [0], [-1], [1.5], ["1"], [1] * 100, [1] * 10_000, [1 << 40],
                     [HUGE], [[1]], {"1": 1}, [1, 1]],
    "num_blocks": [0, -1, 2, 64, 65, 10**6, 10**9, HUGE, "1", None, 1.0, [1], True],
    "attn_resolutions": [None, 8, [8], ["8"], [0.5], [8] * 10_000, [HUGE], {"8": 1}, [None], "8"],
    "dropout": ["x", [], float("nan"), 1e400],
    "sigma_min": ["0", None, float("nan"), -1, [0], 1e400, HUGE],
    "sigma_max": ["0", None, float("nan"), -1, [0], HUGE],
    "sigma_data": [0, "0.5", None, float("nan"), -1, 1e400, [0.5], HUGE],
    "augment_dim": [-1, "9", 1.0, 1 << 40, 9],
    "channel_mult_emb": [0, -4, 1 << 40, "4", 2.0, 3],
    "resample_filter": [[], [0], [1e400], "11", [1] * 10_000, [0, 0], [float("nan")]],
    "embedding_type": ["fourier", None, [], 3],
    "self": [1], "in_channels": [1], "": [1], "__class__": [1], "x" * 5000: [1], "\x1b[31m": [1],
}  # fmt: skip
TEXTS: dict[str, list[str]] = {
    "format": ["", "fastgan", "FASTGAN-NETWORK", "pt", "x" * 100_000],
    "version": ["", "0", "2", "1.0", "01", "1 ", "9" * 5000, "\x1b[2J"],
    "nimg": ["", "-1", "1.5", "1e3", "0x10", " 1", "1 ", "9" * 19, "9" * 5000, "\u0661", "NaN",
    "None"],
    "config": [
        "", "{", "[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"a":' * 5000, "NaN", "{} {}",
        '{"precond": ' + "9" * 5000 + "}", " " * 2_000_000 + "{}", '{"a": NaN}', "{'a': 1}", "\0",
        '{"model_type": "\\ud800"}', '{"precond": "\\u001b[31m"}', '{"channel_mult": ' + "[" * 900
        + "]" * 900 + "}", json.dumps(CONFIG)[:-1], json.dumps(CONFIG) + "x",
    ],
    "provenance": [
        "", "{", "[]", "null", "[" * 100_000, '{"a":' * 990 + "1" + "}" * 990, "{} {}", "9" * 5000,
        " " * 2_000_000 + "{}",
    ],
}  # fmt: skip
# May be read, and must then do no harm where they are written into another network file.
PROVENANCES = [
    '{"a":' * 400 + "1" + "}" * 400, '{"a":' * 800 + "1" + "}" * 800, '{"a": "\\ud800"}',
    '{"a": ' + "9" * 4000 + "}", '{"base_model": [1]}', '{"license": {"a": 1}}', '{"a": 1, "a": 2}',
    '{"a": ' + "[" * 930 + "]" * 930 + "}", '{"": NaN}', '{"a": "\\u001b[2J"}', '{"base": 3}',
    '{"a": "' + "x" * 1_000_000 + '"}',
]  # fmt: skip
ENTRIES: list[Any] = [
    None, 3, [], {}, {"dtype": "F32"}, {"dtype": "F32", "shape": [4]},
    *({"dtype": d, "shape": [4], "data_offsets": [0, 16]}
      for d in ("F64", "F16", "I32", "BOOL", "C64", "O", "", "f32", None, 3, "F4", "F8_E4M3",
      "U64")),
    *({"dtype": "F32", "shape": s, "data_offsets": [0, 16]}
      for s in (None, 4, [], [-4], [4.0], ["4"], [2**63], [2**62, 4], [2**32, 2**32], [0], [0,
      2**60],
                [1] * 64, [1] * 10_000, [4, 1], [[4]], [2**64], [5], [3], [True])),
    *({"dtype": "F32", "shape": [4], "data_offsets": o}
      for o in (None, 0, [], [0], [0, 16, 32], [16, 0], [-1, 15], [1, 17], [0, 2**63], [2**64, 1],
                [2**63, 2**63 + 16], [0, 10**30], ["0", "16"], [0.0, 16.0], [8, 24], [0, 15])),
]  # fmt: skip


@cache
def state() -> dict[str, torch.Tensor]:
    with seeded(0):
        return network_from_config(CONFIG).state_dict()


@cache
def tensors() -> bytes:
    whole = save(state(), METADATA)
    (length,) = struct.unpack_from("<Q", whole)
    # safetensors orders the metadata differently in every process.
    header = json.dumps(json.loads(whole[8 : 8 + length]), sort_keys=True)
    return packed(header.encode(), whole[8 + length :])


def packed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def split() -> tuple[dict[str, Any], bytes]:
    whole = tensors()
    (length,) = struct.unpack_from("<Q", whole)
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    header, data = split()
    edit(header)
    return packed(json.dumps(header).encode(), data)


def with_metadata(**changes: Any) -> bytes:
    def edit(header: dict[str, Any]) -> None:
        merged = {**METADATA, **changes}
        header["__metadata__"] = {key: v for key, v in merged.items() if v is not None}

    return edited(edit)


def with_config(**changes: Any) -> bytes:
    return with_metadata(config=json.dumps({**CONFIG, **changes}))


def _metadata() -> list[Case]:
    cases = [
        Case("config", f"{key[:20]!a} {i}: {json.dumps(value)[:30]}", with_config(**{key: value}))
        for key, values in OTHER_CONFIGS.items()
        for i, value in enumerate(values)
    ]
    for key in CONFIG:
        without = json.dumps({k: v for k, v in CONFIG.items() if k != key})
        cases.append(Case("config", f"without {key}", with_metadata(config=without)))
    for key, texts in TEXTS.items():
        for i, text in enumerate(texts):
            content = with_metadata(**{key: text})
            cases.append(Case("metadata", f"{key} {i}: {text[:30]!a}", content, "refused"))
    for i, text in enumerate(PROVENANCES):
        content = with_metadata(provenance=text)
        cases.append(Case("provenance", f"{i}: {text[:30]}", content))
    for key in ("format", "version", "kind", "config", "nimg", "license", "provenance"):
        cases.append(Case("metadata", f"without {key}", with_metadata(**{key: None}), "refused"))
        cases.append(Case("metadata", f"{key} is 3", with_metadata(**{key: 3}), "refused"))
    for value in (None, [], "x", 3, {"a": {}}, {"a": None}):
        content = edited(lambda h, v=value: h.update(__metadata__=v))  # type: ignore[misc]
        cases.append(Case("metadata", f"is {value}", content, "refused"))
    licence = with_metadata(license="x" * 500_000)
    return [*cases, Case("metadata", "a licence of 500,000 characters", licence)]


def _headers() -> list[Case]:
    header, data = split()
    first = next(name for name in header if name != "__metadata__")
    cases = []
    for i, entry in enumerate(ENTRIES):
        content = edited(lambda h, e=entry: h.update({first: e}))  # type: ignore[misc]
        cases.append(Case("entry", f"{i}: {json.dumps(entry)[:60]}", content, "refused"))
        content = packed(json.dumps({"__metadata__": METADATA, first: entry}).encode(), bytes(16))
        cases.append(Case("entry", f"{i} alone: {json.dumps(entry)[:60]}", content, "refused"))
    text = json.dumps(header).encode()
    for length in (
        0,
        1,
        len(text) - 8,
        len(text) + 8,
        2**20,
        10**8,
        10**8 + 1,
        2**31,
        2**63,
        2**64 - 1,
    ):
        cases.append(Case("length", f"{length}", packed(text, data, length), "refused"))
    overlapping = {
        n: {**e, "data_offsets": [0, 16]} for n, e in header.items() if n != "__metadata__"
    }
    headers: dict[str, bytes] = {
        "overlapping tensors": json.dumps({"__metadata__": METADATA, **overlapping}).encode(),
        "no tensors": json.dumps({"__metadata__": METADATA}).encode(),
        "no metadata": json.dumps({n: e for n,
        e in header.items() if n != "__metadata__"}).encode(),
        "metadata twice": text[:-1] + b', "__metadata__": {}}',
        "a tensor twice": text[:-1] + f', "{first}": {json.dumps(header[first])}}}'.encode(),
        "lists": b"[" * 50_000, "a list": b"[]", "null": b"null", "spaces": b" " * 50_000,
        "not UTF-8": text.replace(b"edm", b"\xff\xfe\xfd"), "cut": text[:-30],
        "deep": b'{"a":' * 10_000, "NaN": text.replace(b"[4]", b"[NaN]"), "text": b"x" * 200,
        "a name of 50,000 characters": text.replace(first.encode(), b"x" * 50_000),
        "a name that commands": text.replace(first.encode(), b"\\u001b[31m\\u0007\\n"),
        "a name that leaves": text.replace(first.encode(), b"../../../../etc/passwd"),
        "50,000 tensors": json.dumps({"__metadata__": METADATA, **{
            f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)
        }}).encode(),
    }  # fmt: skip
    repeated = ("a tensor twice", "metadata twice")
    cases += [
        Case("header", name, packed(text, data), None if name in repeated else "refused")
        for name, text in headers.items()
    ]
    cases.append(Case("header", "more data", packed(text, data + bytes(8)), "refused"))
    cases.append(Case("header", "no data", packed(text, b""), "refused"))
    return cases


def _dtypes() -> list[Case]:
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        content = save({k: v.to(dtype) for k, v in state().items()}, METADATA)
        cases.append(Case("dtype", str(dtype), content, "valid"))
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64):
        content = save({k: v.to(dtype) for k, v in state().items()}, METADATA)
        cases.append(Case("dtype", str(dtype), content, "refused"))
    nan = {k: torch.full_like(v, float("nan")) for k, v in state().items()}
    cases.append(Case("dtype", "NaN", save(nan, METADATA)))
    places = {"a folder": Path.mkdir, "a pipe": os.mkfifo, "nothing": lambda p: None}
    places["a device"] = lambda p: p.symlink_to("/dev/zero")
    return [*cases, *(Case("place", name, make, "refused") for name, make in places.items())]


def cases() -> list[Case]:
    whole = tensors()
    (length,) = struct.unpack_from("<Q", whole)
    hot = [(0, 16), (8, length), (8, 8 + len(json.dumps(METADATA)))]
    return [*damaged(whole, seed=8, hot=hot), *_metadata(), *_headers(), *_dtypes()]


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


def test_network_file() -> None:
    assert_harmless(Path(__file__).stem)
