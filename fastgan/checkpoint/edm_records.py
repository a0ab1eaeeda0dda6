"""What the records of an EDM pickle mean: modules, tensors, numbers.

Works on the inert values of fastgan.checkpoint.inert_pickle. Whatever does not have the expected
form raises UserError with the name of the tensor, or TypeError / ValueError where there is none.
"""

import io
import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastgan.checkpoint.inert_pickle import Record
from fastgan.errors import UserError

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
NN_MODULES = "torch.nn.modules."
MAX_DEPTH = 16  # modules within modules; the published networks have 4 levels
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_NUMBER_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
# The start of torch.save's older form, in which torch pickles a storage inside a pickle; its zip
# form never occurs there, and could be compressed without bound.
_STORAGE_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


def shown(value: object) -> str:
    """Text, a number or an error's first line from a stranger's file, fit for a terminal.

    Anything else is shown by its type: the text of nested containers can be made endless.
    """
    if not isinstance(value, str | int | float | Exception):
        return f"a {type(value).__name__}"
    lines = str(value).splitlines()
    escaped = ascii(lines[0])[1:-1] if lines else ""
    return escaped if len(escaped) <= 100 else escaped[:97] + "..."


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
    budget = max_bytes
    for name, record in _walk(network):
        try:
            if name in state:
                raise ValueError("two tensors of this name")
            state[name] = _tensor(record, budget)
        except Exception as error:
            # torch.load on hostile bytes fails in many ways; its advice runs over several lines.
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


def _tensor(record: object, max_bytes: int) -> Tensor:
    """The tensor that `record` rebuilds, checked against its storage before it is made."""
    if isinstance(record, Record) and record.name == "torch._utils._rebuild_parameter":
        record = record.arguments[0]
    stored, offset, size, stride = _arguments(record, "torch._utils._rebuild_tensor_v2")[:4]
    (blob,) = _arguments(stored, "torch.storage._load_from_bytes")
    size, stride, (offset,) = _counts(size), _counts(stride), _counts((offset,))
    storage = _storage(as_bytes(blob))
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
    """A pickled storage as a flat tensor."""
    if not blob.startswith(_STORAGE_MAGIC):
        raise ValueError("a storage that torch.save did not write")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged one is an error here, with the tensor's name
        loaded = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    if not isinstance(loaded, torch.storage.TypedStorage):
        raise TypeError(f"a {type(loaded).__name__} where a storage belongs")
    flat = torch.empty(0, dtype=loaded.dtype).set_(loaded)
    if not flat.is_floating_point() or flat.nbytes > len(blob):
        raise ValueError(f"{flat.nbytes} bytes of {flat.dtype} in {len(blob)} bytes")
    return flat


def _arguments(record: object, name: str) -> tuple[Any, ...]:
    if not isinstance(record, Record) or record.name != name:
        found = record.name if isinstance(record, Record) else type(record).__name__
        raise TypeError(f"a {found} where a {name} belongs")
    return record.arguments


def _counts(values: object) -> tuple[int, ...]:
    """A tuple of non-negative integers, as sizes, strides and offsets are."""
    if not isinstance(values, tuple) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError("sizes and strides that are no whole numbers")
    return values


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"a {type(value).__name__} where named values belong")
    return value


def _names(value: object) -> set[object]:
    """A set, also in the spelling of protocols 2 and 3: a call on a list."""
    if isinstance(value, Record) and value.name.endswith(".set"):
        (value,) = value.arguments
    if not isinstance(value, set | list):
        raise TypeError(f"a {type(value).__name__} where a set belongs")
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
