"""Pickle programs, instruction by instruction: what an unpickler would do with them is no good."""

import struct
from collections.abc import Callable

MARK, STOP, REDUCE, BUILD, TUPLE, POP = b"(", b".", b"R", b"b", b"t", b"0"
PROTO = b"\x80\x04"
NESTED = b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # 2^60 leaves, hashed


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + MARK + b"".join(arguments) + TUPLE + REDUCE


def root(value: bytes, key: str = "ema") -> bytes:
    """The outermost dict with `value` under `key`."""
    return PROTO + b"}" + text(key) + value + b"s" + STOP


def mapping(**items: bytes) -> bytes:
    return b"}" + MARK + b"".join(text(key) + value for key, value in items.items()) + b"u"


COMMAND = text("touch executed")
# What a file may name but has no business with.
GLOBALS = [
    "os.system", "posix.system", "nt.system", "os.popen", "os.execvp", "os.remove", "os.rename",
    "subprocess.Popen", "subprocess.call", "subprocess.check_output", "builtins.eval",
    "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.getattr", "builtins.open",
    "builtins.setattr", "builtins.map", "builtins.print", "builtins.type", "builtins.breakpoint",
    "builtins.bytearray", "builtins.range", "builtins.dict", "builtins.list", "builtins.tuple",
    "__builtin__.eval", "__builtin__.execfile", "__builtin__.apply", "__builtin__.set.x",
    "importlib.import_module",
    "runpy.run_path", "runpy._run_code", "code.interact", "pdb.run", "timeit.timeit",
    "cProfile.run",
    "pickle.loads", "_pickle.loads", "marshal.loads", "types.FunctionType", "types.CodeType",
    "functools.partial", "functools.reduce", "operator.attrgetter", "operator.methodcaller",
    "operator.itemgetter", "copyreg._reconstructor", "copyreg.__newobj__", "copyreg.add_extension",
    "shutil.rmtree", "shutil.move", "socket.socket", "socket.create_connection", "webbrowser.open",
    "urllib.request.urlopen", "ctypes.CDLL", "ctypes.string_at", "sys.exit",
    "sys.setrecursionlimit",
    "signal.raise_signal", "os._exit", "os.kill", "os.fork", "time.sleep", "threading.Thread",
    "multiprocessing.Process", "asyncio.run", "tempfile.mkstemp", "pathlib.Path", "io.open",
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.serialization.load",
    "torch.serialization.add_safe_globals", "torch.ops.load_library", "torch.classes.load_library",
    "torch.utils.cpp_extension.load", "torch.storage._load_from_bytes.x",
    "torch.storage.UntypedStorage",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_sparse_tensor", "torch.Tensor.numpy",
    "torch._dynamo.optimize", "torch.package.PackageImporter", "torch.distributed.rpc.rpc_sync",
    "torch.nn.functional.pad", "torch.nn.parallel.DataParallel", "torch.nn.Module",
    "torch.nn.modules",
    "numpy.load", "numpy.fromfile", "numpy.core.multiarray._reconstruct",
    "numpy.testing._private.utils.runstring",
    "numpy.f2py.crackfortran.myeval", "numpy.lib.npyio.load", "numpy.ndarray", "numpy.dtype.x",
    "collections.OrderedDict.update", "collections.defaultdict", "collections.namedtuple",
    "dnnlib.util.open_url", "dnnlib.util.call_func_by_name", "dnnlib.util.EasyDict.x",
    "torch_utils.persistence.import_hook", "torch_utils.persistence._reconstruct_persistent_obj.x",
    "torch_utils.misc.profiled_function", "_codecs.lookup", "_codecs.register", "codecs.open",
    "fastgan.common.errors.fail", "fastgan.common.files.replace_atomically", "__main__.main",
    "antigravity.x",
    "this.s", "", ".", "..", "os", "a" * 10_000 + ".b", "\x1b[31m.x", "torch.nn.modules\x1b[2J.x",
]  # fmt: skip


def calls_of_globals() -> dict[str, bytes]:
    """Every global, named by an older and by a newer instruction and called with a command."""
    found = {}
    for dotted in GLOBALS:
        module, _, attribute = dotted.rpartition(".")
        label = dotted[:60].encode("unicode_escape").decode()
        found[f"{label}, GLOBAL"] = call(name(module, attribute), COMMAND)
        on_stack = text(module) + text(attribute) + b"\x93"
        found[f"{label}, STACK_GLOBAL"] = call(on_stack, COMMAND)
    return found


def programs() -> dict[str, bytes]:
    """Short programs with instructions that no checkpoint needs, or in an order that none has."""
    system = name("posix", "system")
    allowed = name("torch.nn.modules.linear", "Linear")
    persistent = name("torch_utils.persistence", "_reconstruct_persistent_obj")
    huge = b"\xff\xff\xff\x7f"
    bodies = {
        "INST": MARK + COMMAND + b"iposix\nsystem\n", "OBJ": MARK + system + COMMAND + b"o",
        "NEWOBJ": system + MARK + COMMAND + TUPLE + b"\x81",
        "NEWOBJ_EX": system + MARK + COMMAND + TUPLE + b"}\x92",
        "PERSID": b"P1\n", "BINPERSID": b"K\x01Q", "EXT1": b"\x82\x01", "EXT2": b"\x83\x01\0",
        "EXT4": b"\x84\x01\0\0\0", "DUP": b"]2", "POP": b"K\x010", "POP_MARK": b"(K\x011",
        "STRING": b"S'x'\n", "STRING without quotes": b"Sx\n", "UNICODE": b"Vx\n", "INT": b"I1\n",
        "LONG": b"L" + b"9" * 6000 + b"L\n", "FLOAT": b"Fnan\n", "GET": b"g0\n", "PUT": b"]p0\n",
        "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**40), "NEXT_BUFFER": b"\x97",
        "FROZENSET": b"(\x91",
        "READONLY_BUFFER": b"]\x98", "DICT": b"(d", "LIST": b"(l", "unknown": b"\xf7",
        "zero": b"\0",
        "call of a number": b"K\x01)R", "call of a text": COMMAND + b")R", "call of a record":
        allowed + b")R)R", "call with a list": allowed + b"]R", "call with nothing": allowed + b"R",
        "state of a class": allowed + b"}b", "state of a dict": b"}}b", "state of a list": b"]}b",
        "state of a text": COMMAND + b"}b", "state twice": allowed + b")R}b}b",
        "state of nothing": b"b",
        "attributes": allowed + b")R}" + text("__class__") + system + b"sb",
        "slots": allowed + b")RN}" + text("__reduce__") + system + b"s\x86b",
        "persistence without meta": persistent + b")R", "persistence of a number":
        persistent + b"K\x01\x85R", "meta without a class": persistent + b"}\x85R",
        "GLOBAL of two lines of text": b"ctorch.nn.modules\nlinear.Linear\n", "GLOBAL cut": b"cos",
        "names that are numbers": b"K\x01K\x02\x93", "names that are lists": b"]]\x93",
        "memo from nothing": b"h\x05", "memo of nothing": b"q\x05", "large memo": b"]r" + huge,
        "large memo read": b"j" + huge, "MEMOIZE nothing": b"\x94", "mark alone": MARK,
        "marks": MARK * 100_000, "tuple without mark": TUPLE, "TUPLE3 of two": b"K\x01K\x02\x87",
        "append to a number": b"K\x01K\x02a", "append to nothing": b"a",
        "items of a list": b"](K\x01u",
        "odd items": b"}(K\x01u", "set of lists": b"\x8f(]\x90", "set of nested tuples":
        b"\x8f(" + NESTED + b"\x90", "list as key": b"}]K\x01s",
        "nested key": b"}" + NESTED + b"K\x01s",
        "record as key": b"}" + allowed + b")RK\x01s",
        "float as key": b"}G" + b"\x7f\xf8" + bytes(6) + b"K\x01s",
        "text of 4 GB": b"X\xff\xff\xff\xff", "text of 2^63": b"\x8d" + b"\xff" * 7 + b"\x7f",
        "bytes of 2^63": b"\x8e" + b"\xff" * 7 + b"\x7f", "bytes of 4 GB": b"B\xff\xff\xff\xff",
        "long of 2 GB": b"\x8b" + huge, "long of -1 byte": b"\x8b\xff\xff\xff\xff", "frame of 2^63":
        b"\x95" + b"\xff" * 7 + b"\x7f" + b"}", "frame of 0": b"\x95" + bytes(8) + b"}",
        "frame too short":
        b"\x95\x01" + bytes(7) + b"}}", "two protocols": b"\x80\x02}", "protocol 255": b"\x80\xff}",
        "broken UTF-8": b"X\x02\0\0\0\xff\xfe", "surrogates": b"X\x03\0\0\0\xed\xa0\x80", "itself":
        b"]q\0h\0a", "dict in itself": b"}q\0" + text("a") + b"h\0s", "nested tuples": NESTED,
        "deep lists": b"]" * 100_000 + b"a" * 99_999, "deep tuples": b"N" + b"\x85" * 200_000,
        "deep records": b")" + (allowed + b"h\0\x85R") * 1000,
        "long integer": b"\x8b\x40\x42\x0f\0" + b"\x7f" * 1_000_000,
    }  # fmt: skip
    found = {f"{label} as network": root(body) for label, body in bodies.items()}
    found |= {f"{label} alone": PROTO + body + STOP for label, body in bodies.items()}
    return found


def bombs() -> dict[str, bytes]:
    """Much work for few bytes."""
    dots = b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60))
    many: dict[str, Callable[[], bytes]] = {
        "millions of instructions": lambda: MARK + b"N" * 15_000_000 + TUPLE,
        "millions of texts": lambda: MARK + b"\x8c\0" * 2_000_000 + TUPLE,
        "millions of dicts": lambda: MARK + b"}" * 2_000_000 + TUPLE,
        "millions of memo entries": lambda: b"]" + b"\x94" * 2_000_000,
        "one item many times": lambda: b"]q\0(" + b"h\0" * 200_000 + b"e",
        "a long text many times": lambda: (
            b"](" + text("x" * 1_000_000) + b"q\0" + b"h\0" * 200_000 + b"e"
        ),
        "doubling": lambda: MARK + b"]q\0" + dots + TUPLE,
    }
    return {name: root(make()) for name, make in many.items()}
