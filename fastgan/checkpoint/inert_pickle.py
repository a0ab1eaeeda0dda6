"""A pickle read as data: a stack machine that cannot call anything.

A pickle is a program for a small stack machine (the standard library's `pickletools` documents and
decodes its instructions). This machine has only the instructions that build containers and numbers;
where the program asks for a call, it keeps the name and the arguments as a `Record`. No object of
the file has attributes to set or methods to run, so that there is nothing for a hostile file to
reach. The standard unpicklers do not give this: theirs looks up `__setstate__`, `append` and the
like on whatever lies on the stack, and one instruction with a large memo index fills the memory.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import BinaryIO

MAX_INSTRUCTIONS = 500_000  # EDM's ImageNet network takes about 50,000


class RefusedGlobal(UnpicklingError):
    """The file names a global that is not on the list.

    `root_keys` are the keys of the outermost dict that were read before it: they tell which kind
    of file it is.
    """

    def __init__(self, name: str, root_keys: list[str]) -> None:
        super().__init__(name)
        self.name, self.root_keys = name, root_keys


@dataclass(frozen=True, slots=True)
class GlobalName:
    """The dotted name of a class or function, never looked up."""

    name: str


@dataclass(slots=True, eq=False)
class Record:
    """An object as the file describes it: what would be called, with what, and its state."""

    name: str
    arguments: tuple[object, ...]
    state: object = None


class InertUnpickler:
    """Turns one pickle of protocol 2 to 5 into dicts, lists, tuples, sets, numbers and Records.

    Args:
        file: positioned at the pickle, left behind its end.
        allowed: says of a dotted name whether the file may mention it.
        dicts: names of dict classes; their objects become plain dicts.

    `load` raises RefusedGlobal for a name that is not allowed, and UnpicklingError, ValueError,
    IndexError, KeyError or TypeError for a damaged file.
    """

    def __init__(
        self, file: BinaryIO, allowed: Callable[[str], bool], dicts: frozenset[str]
    ) -> None:
        self.file, self.allowed, self.dicts = file, allowed, dicts
        self.stack: list[object] = []
        self.outer_stacks: list[list[object]] = []  # one for each open mark
        self.memo: dict[int, object] = {}

    def load(self) -> object:
        """The value that the pickle describes."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):
            if count == MAX_INSTRUCTIONS:
                raise UnpicklingError(f"more than {MAX_INSTRUCTIONS} instructions")
            if opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name in _INSTRUCTIONS:
                _INSTRUCTIONS[opcode.name](self, argument)
            else:
                raise UnpicklingError(f"instruction {opcode.name}, which no EDM pickle contains")
        (value,) = self.stack
        return value

    def pop_mark(self) -> list[object]:
        """The values above the topmost mark; the stack continues with what lay below it."""
        items, self.stack = self.stack, self.outer_stacks.pop()
        return items

    def pop(self, count: int) -> list[object]:
        if len(self.stack) < count:
            raise UnpicklingError("a value is missing on the stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def mark(self, _: object) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def name_global(self, joined: str) -> None:
        """`module name`, as the decoder gives the older instruction's two lines."""
        self.push_global(".".join(joined.split(" ", 1)))

    def name_global_from_stack(self, _: object) -> None:
        self.push_global(".".join(str(_exact(part, str)) for part in self.pop(2)))

    def push_global(self, name: str) -> None:
        if not self.allowed(name):
            root = [*self.outer_stacks, self.stack][1:2]
            keys = [key for items in root for key in items[::2] if isinstance(key, str)]
            raise RefusedGlobal(name, keys)
        self.stack.append(GlobalName(name))

    def construct(self, _: object) -> None:
        """A call or an instantiation, noted down."""
        callee, arguments = self.pop(2)
        if type(callee) is not GlobalName or type(arguments) is not tuple:
            raise UnpicklingError("a call of something that is no global")
        is_dict = callee.name in self.dicts and not arguments
        self.stack.append({} if is_dict else Record(callee.name, arguments))

    def set_state(self, _: object) -> None:
        (state,), target = self.pop(1), self.stack[-1]
        if type(target) is not Record:
            raise UnpicklingError(f"a state for a {type(target).__name__}")
        target.state = state

    def tuple_from_mark(self, _: object) -> None:
        items = tuple(self.pop_mark())
        self.stack.append(items)

    def append(self, _: object) -> None:
        (item,) = self.pop(1)
        self.extend([item])

    def appends(self, _: object) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise UnpicklingError(f"list items for a {type(target).__name__}")
        target.extend(items)

    def set_item(self, _: object) -> None:
        self.update(self.pop(2))

    def set_items(self, _: object) -> None:
        self.update(self.pop_mark())

    def update(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise UnpicklingError(f"dict items for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def add_items(self, _: object) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if type(target) is not set:
            raise UnpicklingError(f"set items for a {type(target).__name__}")
        target.update(_key(item) for item in items)


def _exact(value: object, kind: type) -> object:
    if type(value) is not kind:
        raise UnpicklingError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _key(value: object) -> object:
    """A dict key or set item: hashing a nested tuple can be made to take for ever."""
    if type(value) not in (str, int):
        raise UnpicklingError(f"a {type(value).__name__} as a key")
    return value


def _push(make: Callable[[], object]) -> Callable[[InertUnpickler, object], None]:
    return lambda machine, _: machine.stack.append(make())


def _push_tuple(count: int) -> Callable[[InertUnpickler, object], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
    | {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
)
_INSTRUCTIONS: dict[str, Callable[..., None]] = {
    "PROTO": lambda machine, version: None,
    "FRAME": lambda machine, size: None,
    "STOP": lambda machine, _: None,
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_TUPLE": _push(tuple),
    "EMPTY_LIST": _push(list),
    "EMPTY_DICT": _push(dict),
    "EMPTY_SET": _push(set),
    "TUPLE1": _push_tuple(1),
    "TUPLE2": _push_tuple(2),
    "TUPLE3": _push_tuple(3),
    "TUPLE": InertUnpickler.tuple_from_mark,
    "MARK": InertUnpickler.mark,
    "MEMOIZE": InertUnpickler.memoize,
    "BINPUT": InertUnpickler.put,
    "LONG_BINPUT": InertUnpickler.put,
    "BINGET": InertUnpickler.get,
    "LONG_BINGET": InertUnpickler.get,
    "GLOBAL": InertUnpickler.name_global,
    "STACK_GLOBAL": InertUnpickler.name_global_from_stack,
    "REDUCE": InertUnpickler.construct,
    "NEWOBJ": InertUnpickler.construct,
    "BUILD": InertUnpickler.set_state,
    "APPEND": InertUnpickler.append,
    "APPENDS": InertUnpickler.appends,
    "SETITEM": InertUnpickler.set_item,
    "SETITEMS": InertUnpickler.set_items,
    "ADDITEMS": InertUnpickler.add_items,
}
