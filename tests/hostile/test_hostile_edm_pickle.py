"""Published checkpoints are pickles: programs that nothing may run."""

import io
import os
import struct
import warnings
from collections import OrderedDict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastgan.checkpoint.edm_pickle import import_edm
from fastgan.checkpoint.network_file import load_network_file
from fastgan.common.noise import seeded
from fastgan.models import network_from_config
from tests.checkpoint.edm_writer import Call, edm_root, module_tree, write_pickle
from tests.hostile.damage import damaged
from tests.hostile.harness import Case, Suite, assert_harmless
from tests.hostile.pickles import (
    NESTED,
    bombs,
    call,
    calls_of_globals,
    data,
    mapping,
    name,
    programs,
    root,
    text,
)
from tests.hostile.test_hostile_network_file import CONFIG, OTHER_CONFIGS

WEIGHT = (16, 4)  # of model.map_layer0
LAYOUTS: list[tuple[Any, Any, Any]] = [
    (0, (16, 5), (5, 1)), (1, (16, 4), (4, 1)), (1 << 80, (16, 4), (4, 1)), (0, (17, 4), (4, 1)),
    (-1, (16, 4), (4, 1)), (0, (-16, -4), (4, 1)), (0, (16, 4), (4, -1)), (0, (16.0, 4), (4, 1)),
    (0, [16, 4], (4, 1)), (0, (True, 4), (4, 1)), (0, (16, 4), (4,)), (0, (1,) * 3000, (1,) * 3000),
    (0, (1 << 40, 1 << 40), (0, 0)), (0, (1 << 20, 1 << 10), (0, 0)), (0, (), ()), (0, (0,), (1,)),
    (0, (1 << 62, 0), (1, 1)), (0, (1 << 130,), (0,)), (None, (16, 4), (4, 1)), (0, None, None),
    (0, (1,) * 20 + (64,), (1,) * 21), (0, (16, 4), (1 << 70, 1)), (63, (16, 4), (0, 0)),
    (0, ((16,), 4), (4, 1)), (0, ("16", 4), (4, 1)), (0.0, (16, 4), (4, 1)), (0, (4, 16), (16, 1)),
]  # fmt: skip


@cache
def state() -> dict[str, torch.Tensor]:
    with seeded(0):
        return network_from_config(CONFIG).state_dict()


def pickled(edit: Any = None, protocol: int = 4, **arguments: Any) -> bytes:
    """The bytes of a checkpoint, its network changed by `edit` or by constructor arguments."""
    tree = module_tree(CONFIG, state(), "open('executed', 'w').close()")
    tree._init_kwargs.update(arguments)  # type: ignore[union-attr, operator]
    if edit is not None:
        edit(tree)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about storages
        return write_pickle(Path(folder, "net.pkl"), edm_root(tree), protocol).read_bytes()


def beside(whole: bytes, value: bytes) -> bytes:
    """The checkpoint `whole` with one more entry: nothing that is read needs it."""
    assert whole.endswith(b"u.")
    return whole[:-2] + text("extra") + value + whole[-2:]


def with_weight(value: object) -> bytes:
    return pickled(lambda tree: tree.model.map_layer0._parameters.update(weight=value))


def with_blob(blob: bytes) -> bytes:
    storage = Call(torch.storage._load_from_bytes, blob)
    arguments = (storage, 0, WEIGHT, (4, 1), False, OrderedDict())
    return with_weight(Call(torch._utils._rebuild_tensor_v2, *arguments))


@cache
def storage() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = torch.zeros(WEIGHT).storage()
        torch.save(values, file, _use_new_zipfile_serialization=False)  # noqa: TID251
    return file.getvalue()


def _storages() -> list[Case]:
    whole = storage()
    cases = [
        Case(f"storage {c.kind}", c.name, with_blob(c.content))  # type: ignore[arg-type]
        for c in damaged(whole, seed=10, hot=[(0, len(whole) - 264)])
        if c.kind in ("cut", "foreign", "insert")
    ]
    large = struct.pack("<i", 2**31 - 1)
    count = whole.index(b"K\x40N")  # the number of values
    reserve = call(
        name("builtins", "bytearray"), b"\x8b\x05\0\0\0" + struct.pack("<Q", 1 << 36)[:5]
    )
    key = b"}" + NESTED + b"K\x01s"
    end = whole.index(b"K\x40N") + 2
    changes = {
        "2^31 values": whole[:count] + b"J" + large + whole[count + 2 :],
        "2^70 values": whole[:count] + b"\x8a\x09" + bytes(8) + b"\x40" + whole[count + 2 :],
        "True values": whole[:count] + b"\x88" + whole[count + 2 :],
        "64.0 values": whole[:count] + b"G" + struct.pack(">d", 64) + whole[count + 2 :],
        "another type": whole.replace(b"FloatStorage", b"LongStorage"),
        "no type": whole.replace(b"torch\nFloatStorage", b"posix\nsystem"),
        "2^63 stored": whole[:-264] + struct.pack("<Q", 2**63) + whole[-256:],
        "a large array": whole[:end] + reserve + b"0" + whole[end:],
        "a key that hashes for ever": whole[:end] + key + b"0" + whole[end:],
        "a million instructions": whole[:end] + b"N0" * 1_000_000 + whole[end:],
        "a call": whole[:end] + call(name("posix", "system"),
        text("touch executed")) + b"0" + whole[end:],
        "a zip": b"PK\x03\x04" + bytes(100), "more values": whole + bytes(4),
    }  # fmt: skip
    cases += [Case("storage", label, with_blob(b), "refused") for label, b in changes.items()]
    cases.append(Case("storage", "whole", with_blob(whole), "valid"))
    for i, (offset, size, stride) in enumerate(LAYOUTS):
        arguments = (torch.zeros(64).untyped_storage(), offset, size, stride, False, OrderedDict())
        described = Call(torch.storage._load_from_bytes, whole)
        tensor = Call(torch._utils._rebuild_tensor_v2, described, *arguments[1:])
        label = f"{i}: {offset}, {str(size)[:30]}, {str(stride)[:30]}"[:80]
        expected: Any = "valid" if i == 22 else "refused"
        cases.append(Case("shape", label, with_weight(tensor), expected))
    return cases


def _arguments() -> list[Case]:
    cases = []
    for key, values in OTHER_CONFIGS.items():
        for i, value in enumerate(values):
            label = (
                f"{key[:20]!a} {i}: {str(value)[:30]}" if value != 10**30 else f"{key} {i}: huge"
            )
            cases.append(Case("argument", label, pickled(**{key: value})))
    many = pickled(**{f"x{i}": i for i in range(1000)})
    cases.append(Case("argument", "1,000 of them", many, "refused"))
    texts = pickled(**{f"x{i}": "y" * 100 for i in range(40)})
    return [*cases, Case("argument", "40 texts", texts, "valid")]


def _persistent(
    modules: bytes = b"}", class_name: bytes = text("EDMPrecond"), **state: bytes
) -> bytes:
    content = {"_parameters": b"}", "_buffers": b"}", "_modules": modules, **state}
    meta = mapping(class_name=class_name, state=mapping(**content))
    return call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), meta)


def _layer(modules: bytes = b"}", memoized: bytes = b"") -> bytes:
    """A torch.nn module, kept in the memo by the instruction `memoized`."""
    state = mapping(_parameters=b"}", _buffers=b"}", _modules=modules)
    return call(name("torch.nn.modules.linear", "Linear")) + memoized + state + b"b"


def _trees() -> list[Case]:
    """Records that fit each other in unusual ways."""
    unet = mapping(model=_persistent(class_name=text("SongUNet")))
    deep = _layer()
    for _ in range(30):
        deep = _layer(mapping(a=deep))
    pyramid = _layer(b"}", b"q\xc8")
    for level in range(201, 215):
        again = b"h%c" % (level - 1)
        pyramid = _layer(mapping(a=pyramid, b=again, c=again, d=again), b"q%c" % level)
    children = b"}(" + b"".join(text(f"{i}") + _layer() for i in range(2000)) + b"u"
    long_name = unet + text("x" * 1_000_000) + _layer(children) + b"s"
    loaded = call(name("torch.storage", "_load_from_bytes"), data(storage()))
    tensor = call(
        name("torch._utils", "_rebuild_tensor_v2"), loaded, b"K\0", b"K\x10K\4\x86", b"K\4K\1\x86"
    )
    shared = (
        b"}("
        + text("t")
        + tensor
        + b"q\xc8"
        + b"".join(text(f"t{i}") + b"h\xc8" for i in range(20_000))
        + b"u"
    )
    endless = b"](" + NESTED + b"e"
    trees = {
        "names that hash for ever": _persistent(unet, _non_persistent_buffers_set=endless),
        "a set that hashes for ever": _persistent(
            unet, _non_persistent_buffers_set=call(name("builtins", "set"), endless)
        ),
        "a module in itself": _persistent(
            unet + text("a") + _layer(mapping(a=b"h\xc8"), b"q\xc8") + b"s"
        ),
        "a pyramid of shared modules": _persistent(unet + text("a") + pyramid + b"s"),
        "30 levels of modules": _persistent(unet + text("a") + deep + b"s"),
        "a long name above many": _persistent(long_name),
        "one tensor under many names": _persistent(unet, _parameters=shared),
        "modules that are a list": _persistent(b"]"),
        "parameters that are a text": _persistent(unet, _parameters=text("x")),
        "a model that is a number": _persistent(mapping(model=b"K\1")),
        "no model": _persistent(),
        "arguments that are a number": _persistent(unet, _init_args=b"K\1"),
        "keywords that are a list": _persistent(unet, _init_kwargs=b"]"),
        "a nested keyword": _persistent(unet, _init_kwargs=mapping(x=NESTED)),
        "a nested sigma": _persistent(unet, _init_kwargs=mapping(sigma_min=NESTED)),
        "a nested number of blocks": _persistent(unet, _init_kwargs=mapping(num_blocks=NESTED)),
        "a number as keyword": _persistent(unet, _init_kwargs=b"}K\1K\2s"),
        "a nested class": _persistent(unet, NESTED),
        "a class of escapes": _persistent(unet, text("\x1b[31m\n\a")),
        "a class of 100,000 letters": _persistent(unet, text("x" * 100_000)),
        "EDM2's class": _persistent(unet, text("Precond")),
        "nothing but a model": _persistent(unet),
    }
    cases = [Case("tree", label, root(body), "refused") for label, body in trees.items()]
    for key in ("", "net", "EMA", "encoder", "ema\n", "\x1b[31m", "x" * 100_000):
        content = root(_persistent(unet), key)
        cases.append(Case("tree", f"under {key[:20]!a}", content, "refused"))
    return cases


def cases() -> list[Case]:
    whole = pickled()
    layers = [(0, 400), (len(whole) - 900, len(whole)), (0, len(whole))]
    cases = damaged(whole, seed=9, hot=layers)
    cases += [Case("valid", f"protocol {p}", pickled(protocol=p), "valid") for p in (2, 3, 5)]
    cases += [Case("global", n, beside(whole, c), "refused") for n, c in calls_of_globals().items()]
    harmless = call(name("torch.nn.modules.linear", "Linear"))
    cases.append(Case("global", "one that is allowed", beside(whole, harmless), "valid"))
    cases += [Case("program", n, c, "refused") for n, c in programs().items()]
    cases += [Case("bomb", n, c, "refused") for n, c in bombs().items()]
    places = {"a folder": Path.mkdir, "a pipe": os.mkfifo, "nothing": lambda p: None}
    places["a device"] = lambda p: p.symlink_to("/dev/zero")
    cases += [Case("place", label, make, "refused") for label, make in places.items()]
    return [*cases, *_storages(), *_arguments(), *_trees()]


def read(path: Path) -> None:
    """Imports the checkpoint as the command does; what was written must be readable."""
    target = path.with_name("out.safetensors")
    import_edm(path, target)
    try:
        file = load_network_file(target)
        assert file.state.keys() == state().keys()
        assert all(t.is_floating_point() for t in file.state.values())
    finally:
        target.unlink()


SUITE = Suite("EDM pickle", "edm.pkl", cases, read)


def test_edm_pickle() -> None:
    assert_harmless(Path(__file__).stem)
