"""What the records of an EDM pickle mean: modules, tensors, numbers, constructor arguments.

Works on the inert values of fastgan.checkpoint.inert_pickle. Whatever does not have the expected
form raises UserError with the name of the tensor or argument, or TypeError / ValueError where there
is none.
"""

import io
import math
import pickletools
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from fastgan.checkpoint.inert_pickle import Record
from fastgan.common.errors import UserError, shown

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
NN_MODULES = "torch.nn.modules."
MAX_DEPTH = 16  # modules within modules; the published networks have 4 levels
Counts = tuple[int, ...]
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_NUMBER_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_MAX_NAME = 200  # characters; a name is repeated in those of all that lies below it
_MAX_DIMENSIONS = 8
# How often the same bytes may be read for several tensors, as a share of the file.
_MAX_SHARING = 8
# The start of torch.save's older form, in which torch pickles a storage inside a pickle; its zip
# form never occurs there, and could be compressed without bound.
_STORAGE_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
# Five pickles (that number, the version, the machine, the storage, its key), then the values.
_STORAGE_PICKLES = 5
_MAX_STORAGE_INSTRUCTIONS = 100
_STORAGE_TYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
}
# The order in which the published preconditioning classes take them.
_POSITIONS = (
    "img_resolution",
    "img_channels",
    "label_dim",
    "use_fp16",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "model_type",
)
# Precision is the trainer's, and fine-tuning uses neither kind of dropout.
_DROPPED = ("use_fp16", "dropout", "label_dropout")
_INTEGERS = {
    "img_resolution": (1, 4096),
    "img_channels": (1, 64),
    "label_dim": (0, 1_000_000),
    "augment_dim": (0, 1024),
    "model_channels": (1, 4096),
    "channel_mult_emb": (1, 64),
    "channel_mult_noise": (1, 64),
    "num_blocks": (1, 64),
}
_LISTS = {"channel_mult": (1, 64), "attn_resolutions": (1, 4096), "resample_filter": (1, 1000)}
_MAX_ITEMS = 16
_MAX_ARGUMENTS = 64
_MAX_SIGMA = 1e6
_SIGMAS = ("sigma_min", "sigma_max", "sigma_data")
_TEXTS = ("model_type", "embedding_type", "encoder_type", "decoder_type")
_KNOWN = {*_INTEGERS, *_LISTS, *_SIGMAS, *_TEXTS}


def module_content(record: object) -> tuple[str, dict[str, Any]]:
    """Class name and `__dict__` of a recorded module (EDM's persistent ones, torch.nn's)."""
    if not isinstance(record, Record):
        raise TypeError(f"a {type(record).__name__} where a module belongs")
    if record.name == PERSISTENT:
        (meta,) = record.arguments
        name, content = _mapping(meta)["class_name"], _mapping(meta)["state"]
    elif record.name.startswith(NN_MODULES):
        name, content = record.name.rsplit(".", 1)[1], record.state
    else:
        raise TypeError(f"a {record.name} where a module belongs")
    if not isinstance(name, str):
        raise TypeError("a class name that is no text")
    return name, _mapping(content)


def read_tensors(network: object, max_bytes: int, where: str) -> dict[str, Tensor]:
    """All parameters and persistent buffers below the recorded module `network`.

    Floating point tensors on the CPU, each with memory of its own, together at most `max_bytes`
    (else a few stored bytes could be expanded into any number). `where` names the file in errors.
    """
    state: dict[str, Tensor] = {}
    budget, to_read = max_bytes, _MAX_SHARING * max_bytes
    for name, record in _walk(network):
        try:
            if name in state:
                raise ValueError("two tensors of this name")
            parts = _tensor_arguments(record)
            to_read -= len(parts[0])
            if to_read < 0:
                raise ValueError("too many tensors share their storage")
            state[name] = _tensor(*parts, max_bytes=budget)
        except Exception as error:
            # Decoding hostile bytes fails in many ways.
            raise UserError(
                f"unreadable tensor {shown(name)}, {where} ({shown(error)}), "
                "a whole checkpoint expected"
            ) from error
        budget -= state[name].nbytes
    return state


def _walk(network: object) -> Iterator[tuple[str, object]]:
    """Names and records of the tensors of `network`, every module being visited once."""
    seen: set[int] = set()
    pending = [("", network)]
    while pending:
        prefix, record = pending.pop()
        if id(record) in seen or prefix.count(".") > MAX_DEPTH:
            raise ValueError(f"module {prefix[:-1]} contains itself or occurs twice")
        seen.add(id(record))
        _, content = module_content(record)
        transient = _names(content.get("_non_persistent_buffers_set", set()))
        buffers = _mapping(content["_buffers"])
        tensors = _mapping(content["_parameters"]) | {
            name: value for name, value in buffers.items() if name not in transient
        }
        yield from ((prefix + name, value) for name, value in tensors.items() if value is not None)
        children = _mapping(content["_modules"])
        pending += [(f"{prefix}{n}.", m) for n, m in reversed(children.items()) if m is not None]


def _tensor_arguments(record: object) -> tuple[bytes, int, Counts, Counts]:
    """What a recorded tensor is made of: the bytes of its storage, offset, size and stride."""
    if isinstance(record, Record) and record.name == "torch._utils._rebuild_parameter":
        record = record.arguments[0]
    stored, offset, size, stride = _arguments(record, "torch._utils._rebuild_tensor_v2")[:4]
    (blob,) = _arguments(stored, "torch.storage._load_from_bytes")
    return as_bytes(blob), _counts((offset,))[0], _counts(size), _counts(stride)


def _tensor(blob: bytes, offset: int, size: Counts, stride: Counts, max_bytes: int) -> Tensor:
    """The described part of the storage in `blob`, checked before it is made."""
    storage = _storage(blob)
    values = math.prod(size)
    if values * storage.element_size() > max_bytes:
        raise ValueError(f"shape {size} takes more bytes than the file has")
    if len(size) != len(stride):
        raise ValueError(f"{len(size)} sizes with {len(stride)} strides")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if values and last >= len(storage):
        raise ValueError(f"shape {size} does not fit its storage of {len(storage)} values")
    view = storage.as_strided(size, stride, offset) if values else storage.new_empty(size)
    return view.clone(memory_format=torch.contiguous_format)


def _storage(blob: bytes) -> Tensor:
    """The flat tensor in what `torch.save` wrote of a storage, decoded here: torch.load can be made
    to reserve any amount of memory, and to hash for ever."""
    if not blob.startswith(_STORAGE_MAGIC):
        raise ValueError("a storage that torch.save did not write")
    file = io.BytesIO(blob)
    *_, described, _ = (_literals(file) for _ in range(_STORAGE_PICKLES))
    tag, kind, _, _, count = described
    if tag != "storage" or kind not in _STORAGE_TYPES:
        raise TypeError(f"a {kind} where a storage of floating point numbers belongs")
    dtype, stored = _STORAGE_TYPES[kind], int.from_bytes(file.read(8), "little")
    values = file.read()
    if type(count) is not int or not count == stored == len(values) / dtype.itemsize:
        raise ValueError(f"{count} values of {dtype} in {len(values)} bytes")
    return torch.frombuffer(bytearray(values), dtype=dtype) if values else torch.empty(0).to(dtype)


def _literals(file: io.BytesIO) -> list[Any]:
    """Texts, numbers and names in the next pickle of `file`, which is left behind its end."""
    instructions = list(islice(pickletools.genops(file), _MAX_STORAGE_INSTRUCTIONS))
    if instructions[-1][0].name != "STOP":
        raise ValueError(f"more than {_MAX_STORAGE_INSTRUCTIONS} instructions for a storage")
    others = ("PROTO", "BINPUT", "LONG_BINPUT")
    return [
        value for code, value, _ in instructions if value is not None and code.name not in others
    ]


def _arguments(record: object, name: str) -> tuple[Any, ...]:
    if not isinstance(record, Record) or record.name != name:
        found = record.name if isinstance(record, Record) else type(record).__name__
        raise TypeError(f"a {found} where a {name} belongs")
    return record.arguments


def _counts(values: object) -> Counts:
    """A tuple of non-negative integers, as sizes, strides and offsets are."""
    if not isinstance(values, tuple) or len(values) > _MAX_DIMENSIONS:
        values = (None,)
    if not all(_is_whole(v, 0, 1 << 127) for v in values):
        raise ValueError("sizes and strides that are no whole numbers")
    return values


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"a {type(value).__name__} where named values belong")
    if any(len(key) > _MAX_NAME for key in value):
        raise ValueError(f"a name of more than {_MAX_NAME} characters")
    return value


def _names(value: object) -> set[object]:
    """A set, also in the spelling of protocols 2 and 3: a call on a list."""
    if isinstance(value, Record) and value.name.endswith(".set"):
        (value,) = value.arguments
    # Names only: hashing a nested tuple can be made to take for ever.
    if not isinstance(value, set | list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"a {type(value).__name__} where a set of names belongs")
    return set(value)


def as_bytes(value: object) -> bytes:
    """Bytes, also in the spelling of protocol 2: a call that encodes Latin-1 text."""
    if isinstance(value, Record):
        text, encoding = _arguments(value, "_codecs.encode")
        if encoding != "latin1":
            raise ValueError("bytes in an unknown spelling")
        value = text.encode("latin1")
    if not isinstance(value, bytes):
        raise TypeError(f"a {type(value).__name__} where bytes belong")
    return value


def as_plain(value: object) -> object:
    """A numpy scalar as a Python number; anything else as it is."""
    if not isinstance(value, Record) or value.name not in _SCALARS:
        return value
    kind, data = value.arguments
    code = _arguments(kind, "numpy.dtype")[0]
    state = cast(Record, kind).state
    order = state[1] if isinstance(state, tuple) else "|"
    if code not in _NUMBER_TYPES or order not in ("<", ">", "|", "="):
        raise TypeError(f"a numpy {code} where a number belongs")
    (number,) = np.frombuffer(as_bytes(data), dtype=order + code)
    return number.item()


def architecture(
    precond: str, content: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config for `network_from_config`, and the simple arguments that have no place in it.

    Args:
        precond: EDMPrecond or D2OPrecond.
        content: the `__dict__` of the preconditioning object, as the file records it.
        where: names the file in errors.

    Raises UserError for a known argument of the wrong type or size, and for an unknown one that is
    not a number, a text or a short list of them.
    """
    unet_class, _ = module_content(content["_modules"]["model"])
    positional = zip(_POSITIONS, content.get("_init_args", ()), strict=False)
    arguments = dict(positional) | content.get("_init_kwargs", {})
    if len(arguments) > _MAX_ARGUMENTS:
        raise UserError(
            f"{len(arguments)} constructor arguments, {where}, at most {_MAX_ARGUMENTS} expected"
        )
    config: dict[str, Any] = {"precond": precond, "model_type": unet_class}
    unused: dict[str, Any] = {}
    for name, value in arguments.items():
        value = as_plain(value)
        if name in _DROPPED or (name == "sigma_max" and value == math.inf):
            continue
        right = what_is_right(name, value)
        if right is not None:
            raise UserError(f"constructor argument {shown(name)}={shown(value)}, {where}, {right}")
        target = config if name in _KNOWN else unused
        target[name] = list(value) if isinstance(value, tuple) else value
    return config, unused


def what_is_right(name: str, value: object) -> str | None:
    """What a constructor argument of a network should be, or None where it is that."""
    if name in _INTEGERS:
        low, high = _INTEGERS[name]
        return None if _is_whole(value, low, high) else f"an integer of {low} to {high} expected"
    if name in _LISTS:
        low, high = _LISTS[name]
        fits = _is_list(value) and all(_is_whole(v, low, high) for v in value)
        return None if fits else f"a short list of integers of {low} to {high} expected"
    if name in _SIGMAS:
        fits = isinstance(value, int | float) and 0 <= value < _MAX_SIGMA
        fits = fits or (name == "sigma_max" and value == math.inf)
        return None if fits else f"a number from 0 to {_MAX_SIGMA} expected"
    if name in _TEXTS:
        return None if _is_simple(value) and isinstance(value, str) else "a short text expected"
    fits = _is_simple(value) or (_is_list(value) and all(map(_is_simple, value)))
    return None if fits else "an argument of the published networks expected"


def _is_whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_list(value: object) -> TypeGuard[list[object] | tuple[object, ...]]:
    return isinstance(value, list | tuple) and len(value) <= _MAX_ITEMS


def _is_simple(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= 100
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) < 1 << 62
    return value is None
