"""Published checkpoints are pickles: programs that nothing may run, instruction by instruction."""

import io
import struct
import warnings
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastgan.checkpoint.edm_pickle import import_edm
from fastgan.checkpoint.network_file import load_network_file
from tests.checkpoint.edm_writer import Call, edm_root, module_tree, write_pickle
from tests.hostile.damage import damaged, each, listed, places
from tests.hostile.harness import Case, Suite
from tests.hostile.network_file import CONFIG, OTHER_CONFIGS, state

MARK, STOP, REDUCE, TUPLE, PROTO = b"(", b".", b"R", b"t", b"\x80\x04"
NESTED = b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # 2^60 leaves, hashed
HUGE = b"\xff\xff\xff\x7f"
# What a file may name but has no business with.
GLOBALS = [
    "os.system", "posix.system", "os.execvp", "os.remove", "subprocess.Popen", "builtins.eval",
    "builtins.exec", "builtins.__import__", "builtins.getattr", "builtins.open", "builtins.dict",
    "builtins.bytearray", "__builtin__.eval", "__builtin__.set.x", "importlib.import_module",
    "runpy.run_path", "pickle.loads", "marshal.loads", "types.FunctionType", "functools.partial",
    "operator.attrgetter", "copyreg._reconstructor", "shutil.rmtree", "socket.socket", "sys.exit",
    "ctypes.CDLL", "time.sleep", "torch.load", "torch.jit.load", "torch.nn.Module",
    "torch.storage._load_from_bytes.x", "torch.storage.UntypedStorage", "torch.nn.modules",
    "torch._utils._rebuild_tensor", "torch.nn.functional.pad", "torch.nn.parallel.DataParallel",
    "numpy.load", "numpy.core.multiarray._reconstruct", "numpy.dtype.x", "_codecs.lookup",
    "collections.OrderedDict.update", "dnnlib.util.open_url", "dnnlib.util.EasyDict.x",
    "torch_utils.persistence._reconstruct_persistent_obj.x", "fastgan.common.errors.fail", "",
    ".", "os", "a" * 10_000 + ".b", "\x1b[31m.x", "torch.nn.modules\x1b[2J.x",
]  # fmt: skip
WEIGHT = (16, 4)  # of model.map_layer0
LAYOUTS: list[tuple[Any, Any, Any]] = [
    (0, (16, 5), (5, 1)), (1, (16, 4), (4, 1)), (1 << 80, (16, 4), (4, 1)), (-1, (16, 4), (4, 1)),
    (0, (-16, -4), (4, 1)), (0, (16, 4), (4, -1)), (0, (16.0, 4), (4, 1)), (0, [16, 4], (4, 1)),
    (0, (True, 4), (4, 1)), (0, (16, 4), (4,)), (0, (1,) * 3000, (1,) * 3000), (0, None, None),
    (0, (1 << 40, 1 << 40), (0, 0)), (0, (1 << 20, 1 << 10), (0, 0)), (0, (), ()), (0, (0,), (1,)),
    (0, (1 << 62, 0), (1, 1)), (0, (1 << 130,), (0,)), (0, (16, 4), (1 << 70, 1)),
]  # fmt: skip


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + MARK + b"".join(arguments) + TUPLE + REDUCE


def mapping(**items: bytes) -> bytes:
    return b"}" + MARK + b"".join(text(key) + value for key, value in items.items()) + b"u"


def root(value: bytes, key: str = "ema") -> bytes:
    """The outermost dict with `value` under `key`."""
    return PROTO + b"}" + text(key) + value + b"s" + STOP


COMMAND, SYSTEM = text("touch executed"), name("posix.system")
LINEAR = name("torch.nn.modules.linear.Linear")
PERSISTENT = name("torch_utils.persistence._reconstruct_persistent_obj")


def _programs() -> dict[str, bytes]:
    """Instructions that no checkpoint needs, or in an order that none has; bombs."""
    dots = b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60))
    return {
        "INST": MARK + COMMAND + b"iposix\nsystem\n", "OBJ": MARK + SYSTEM + COMMAND + b"o",
        "NEWOBJ": SYSTEM + MARK + COMMAND + TUPLE + b"\x81", "PERSID": b"P1\n",
        "NEWOBJ_EX": SYSTEM + MARK + COMMAND + TUPLE + b"}\x92", "BINPERSID": b"K\x01Q",
        "EXT1": b"\x82\x01", "DUP": b"]2", "POP": b"K\x010", "STRING": b"S'x'\n", "PUT": b"]p0\n",
        "LONG": b"L" + b"9" * 6000 + b"L\n", "FROZENSET": b"(\x91", "DICT": b"(d", "zero": b"\0",
        "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**40), "unknown": b"\xf7",
        "call of a number": b"K\x01)R", "call of a text": COMMAND + b")R",
        "call of a record": LINEAR + b")R)R", "call with a list": LINEAR + b"]R",
        "state of a class": LINEAR + b"}b", "state of a dict": b"}}b", "state of nothing": b"b",
        "attributes": LINEAR + b")R}" + text("__class__") + SYSTEM + b"sb",
        "persistence without meta": PERSISTENT + b")R", "no class": PERSISTENT + b"}\x85R",
        "GLOBAL cut": b"cos", "names that are numbers": b"K\x01K\x02\x93", "marks": MARK * 100_000,
        "memo from nothing": b"h\x05", "memo of nothing": b"q\x05", "large memo": b"]r" + HUGE,
        "large memo read": b"j" + HUGE, "MEMOIZE nothing": b"\x94", "tuple without mark": TUPLE,
        "append to a number": b"K\x01K\x02a", "items of a list": b"](K\x01u",
        "odd items": b"}(K\x01u", "set of nested tuples": b"\x8f(" + NESTED + b"\x90",
        "list as key": b"}]K\x01s", "nested key": b"}" + NESTED + b"K\x01s",
        "record as key": b"}" + LINEAR + b")RK\x01s", "text of 4 GB": b"X\xff\xff\xff\xff",
        "bytes of 2^63": b"\x8e" + b"\xff" * 7 + b"\x7f", "long of 2 GB": b"\x8b" + HUGE,
        "frame of 2^63": b"\x95" + b"\xff" * 7 + b"\x7f" + b"}", "protocol 255": b"\x80\xff}",
        "itself": b"]q\0h\0a", "broken UTF-8": b"X\x02\0\0\0\xff\xfe", "nested tuples": NESTED,
        "deep lists": b"]" * 100_000 + b"a" * 99_999, "deep tuples": b"N" + b"\x85" * 200_000,
        "millions of instructions": MARK + b"N" * 9_000_000 + TUPLE,
        "millions of memo entries": b"]" + b"\x94" * 2_000_000, "doubling": MARK + b"]q\0" + dots,
        "a long text many times": b"](" + text("x" * 1_000_000) + b"q\0" + b"h\0" * 200_000 + b"e",
    }  # fmt: skip


def pickled(edit: Any = None, protocol: int = 4, **arguments: Any) -> bytes:
    """The bytes of a checkpoint, its network changed by `edit` or by constructor arguments."""
    tree = module_tree(CONFIG, state(), "open('executed', 'w').close()")
    tree._init_kwargs.update(arguments)  # type: ignore[union-attr, operator]
    if edit is not None:
        edit(tree)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about storages
        return write_pickle(Path(folder, "net.pkl"), edm_root(tree), protocol).read_bytes()


def with_weight(blob: bytes, offset: Any = 0, size: Any = WEIGHT, stride: Any = (4, 1)) -> bytes:
    """A checkpoint whose first weight is described like this."""
    storage = Call(torch.storage._load_from_bytes, blob)
    arguments = (storage, offset, size, stride, False, OrderedDict())
    weight = Call(torch._utils._rebuild_tensor_v2, *arguments)
    return pickled(lambda tree: tree.model.map_layer0._parameters.update(weight=weight))


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
    count = whole.index(b"K\x40N")  # the number of values
    head, tail, rest = whole[:count], whole[count + 2 :], whole[: count + 2]
    array = call(name("builtins.bytearray"), b"\x8b\x05\0\0\0" + struct.pack("<Q", 1 << 36)[:5])
    run = call(SYSTEM, COMMAND)
    wrong = {
        "2^31 values": head + b"J" + HUGE + tail, "True values": head + b"\x88" + tail,
        "2^70 values": head + b"\x8a\x09" + bytes(8) + b"\x40" + tail, "a zip": b"PK\x03\x04",
        "64.0 values": head + b"G" + struct.pack(">d", 64) + tail, "more": whole + bytes(4),
        "another type": whole.replace(b"FloatStorage", b"LongStorage"),
        "no type": whole.replace(b"torch\nFloatStorage", b"posix\nsystem"),
        "2^63 stored": whole[:-264] + struct.pack("<Q", 2**63) + whole[-256:],
        "a large array": rest + array + b"0" + tail, "a call": rest + run + b"0" + tail,
        "a key that hashes for ever": rest + b"}" + NESTED + b"K\x01s0" + tail,
        "a million instructions": rest + b"N0" * 1_000_000 + tail,
    }  # fmt: skip
    cut = [whole[:n] for n in range(0, len(whole), 9)]
    right = {"whole": with_weight(whole), "transposed": with_weight(whole, 63, WEIGHT, (0, 0))}
    return [
        *listed("storage", {label: with_weight(blob) for label, blob in wrong.items()}),
        *listed("valid", right, "valid"),
        *each("storage cut", cut, with_weight),
        *each("shape", LAYOUTS, lambda layout: with_weight(whole, *layout)),
    ]


def _persistent(modules: bytes = b"}", class_name: bytes = text("EDMPrecond"), **state: bytes
) -> bytes:  # fmt: skip
    content = {"_parameters": b"}", "_buffers": b"}", "_modules": modules, **state}
    return call(PERSISTENT, mapping(class_name=class_name, state=mapping(**content)))


def _layer(modules: bytes = b"}", memoized: bytes = b"") -> bytes:
    """A torch.nn module, kept in the memo by the instruction `memoized`."""
    content = mapping(_parameters=b"}", _buffers=b"}", _modules=modules)
    return call(LINEAR) + memoized + content + b"b"


def _trees() -> list[Case]:
    """Records that fit each other in unusual ways."""
    unet = mapping(model=_persistent(class_name=text("SongUNet")))
    deep = pyramid = _layer(b"}", b"q\xc8")
    for level in range(201, 231):
        deep = _layer(mapping(a=deep))
        again = b"h%c" % (level - 1)
        pyramid = _layer(mapping(a=pyramid, b=again, c=again), b"q%c" % level)
    children = b"}(" + b"".join(text(f"{i}") + _layer() for i in range(2000)) + b"u"
    blob = b"B" + struct.pack("<I", len(storage())) + storage()
    loaded = call(name("torch.storage._load_from_bytes"), blob)
    sizes = (b"K\0", b"K\x10K\4\x86", b"K\4K\1\x86")
    tensor = text("t") + call(name("torch._utils._rebuild_tensor_v2"), loaded, *sizes) + b"q\xc8"
    shared = b"}(" + tensor + b"".join(text(f"t{i}") + b"h\xc8" for i in range(20_000)) + b"u"
    endless, below = b"](" + NESTED + b"e", unet + text("a")
    sets = {"": endless, " in a set": call(name("builtins.set"), endless)}
    tree = partial(_persistent, unet)
    trees = {
        **{f"names that hash for ever{how}": tree(_non_persistent_buffers_set=names)
           for how, names in sets.items()},
        "a module in itself": _persistent(below + _layer(mapping(a=b"h\xc8"), b"q\xc8") + b"s"),
        "a pyramid of shared modules": _persistent(below + pyramid + b"s"),
        "30 levels of modules": _persistent(below + deep + b"s"),
        "a long name": _persistent(unet + text("x" * 1_000_000) + _layer(children) + b"s"),
        "one tensor under many names": tree(_parameters=shared), "a list": _persistent(b"]"),
        "parameters that are a text": tree(_parameters=text("x")), "no model": _persistent(),
        "a model that is a number": _persistent(mapping(model=b"K\1")), "nothing else": tree(),
        "arguments that are a number": tree(_init_args=b"K\1"),
        **{f"keywords {i}": tree(_init_kwargs=keywords) for i, keywords in enumerate((b"]",
           b"}K\1K\2s", *(mapping(**{k: NESTED}) for k in ("x", "sigma_min", "num_blocks"))))},
        **{f"class {i}": tree(found) for i, found in enumerate((NESTED, text("\x1b[31m\n\a"),
           text("x" * 100_000), text("Precond")))},
    }  # fmt: skip
    keys = ("", "net", "EMA", "encoder", "ema\n", "\x1b[31m", "x" * 100_000)
    return [
        *listed("tree", {label: root(body) for label, body in trees.items()}),
        *each("key", keys, lambda key: root(tree(), key)),
    ]


def cases() -> list[Case]:
    whole = pickled()

    def beside(value: bytes) -> bytes:
        """One more entry: nothing that is read needs it."""
        return whole[:-2] + text("extra") + value + whole[-2:]

    def on_stack(dotted: str) -> bytes:
        module, _, attribute = dotted.rpartition(".")
        return text(module) + text(attribute) + b"\x93"

    hot = [(0, 400), (len(whole) - 900, len(whole)), (0, len(whole))]
    programs = _programs()
    changes = [{key: value} for key, values in OTHER_CONFIGS.items() for value in values]
    right = {f"protocol {p}": pickled(protocol=p) for p in (2, 3, 5)}
    right |= {"allowed": beside(call(LINEAR)), "40": pickled(**{f"x{i}": "y" for i in range(40)})}
    return [
        *damaged(whole, seed=9, hot=hot), *listed("valid", right, "valid"), *places(), *_trees(),
        *each("global", GLOBALS, lambda dotted: beside(call(name(dotted), COMMAND))),
        *each("on the stack", GLOBALS, lambda dotted: beside(call(on_stack(dotted), COMMAND))),
        *listed("program", {label: root(body) for label, body in programs.items()}),
        *listed("program alone", {n: PROTO + body + STOP for n, body in programs.items()}),
        *each("argument", changes, lambda change: pickled(**change), None),
        *listed("argument", {"1,000": pickled(**{f"x{i}": i for i in range(1000)})}),
        *_storages(),
    ]  # fmt: skip


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
