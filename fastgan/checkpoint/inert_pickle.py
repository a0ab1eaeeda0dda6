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
from typing import Any, BinaryIO, TypeVar

MAX_INSTRUCTIONS = 500_000  # EDM's ImageNet network takes about 50,000

_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
    | {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
)
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
T = TypeVar("T")


class RefusedGlobal(UnpicklingError):
    """The file names a global that is not on the list: this one."""


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
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name not in _IGNORED:
                self._do(opcode.name, argument)
        (value,) = self.stack
        return value

    def _do(self, instruction: str, argument: Any) -> None:
        """What pickletools says of the instruction, without ever calling what the file names."""
        match instruction:
            case "MARK":
                self.outer_stacks.append(self.stack)
                self.stack = []
            case "TUPLE":
                whole = tuple(self._pop_mark())
                self.stack.append(whole)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self._pop(int(instruction[-1]))))
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":  # `module name`, as the decoder gives the instruction's two lines
                self._push_global(".".join(argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self._push_global(".".join(str(_exact(part, str)) for part in self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                self._construct(*self._pop(2))
            case "BUILD":
                (state,) = self._pop(1)
                self._top(Record).state = state
            case "APPEND":
                (item,) = self._pop(1)
                self._top(list).append(item)
            case "APPENDS":
                items = self._pop_mark()
                self._top(list).extend(items)
            case "SETITEM":
                self._update(self._pop(2))
            case "SETITEMS":
                self._update(self._pop_mark())
            case "ADDITEMS":
                items = self._pop_mark()
                self._top(set).update(_key(item) for item in items)
            case _:
                raise UnpicklingError(f"instruction {instruction}, which no EDM pickle contains")

    def _pop_mark(self) -> list[object]:
        """The values above the topmost mark; the stack continues with what lay below it."""
        items, self.stack = self.stack, self.outer_stacks.pop()
        return items

    def _pop(self, count: int) -> list[object]:
        if len(self.stack) < count:
            raise UnpicklingError("a value is missing on the stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _top(self, kind: type[T]) -> T:
        return _exact(self.stack[-1], kind)

    def _push_global(self, name: str) -> None:
        if not self.allowed(name):
            raise RefusedGlobal(name)
        self.stack.append(GlobalName(name))

    def _construct(self, callee: object, arguments: object) -> None:
        """A call or an instantiation, noted down."""
        name, arguments = _exact(callee, GlobalName).name, _exact(arguments, tuple)
        is_dict = name in self.dicts and not arguments
        self.stack.append({} if is_dict else Record(name, arguments))

    def _update(self, items: list[object]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value


def _exact(value: object, kind: type[T]) -> T:
    """The value, whose type is `kind` and no other: nothing of a file's has methods of its own."""
    if type(value) is not kind:
        raise UnpicklingError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _key(value: object) -> object:
    """A dict key or set item: hashing a nested tuple can be made to take for ever."""
    if type(value) not in (str, int):
        raise UnpicklingError(f"a {type(value).__name__} as a key")
    return value
