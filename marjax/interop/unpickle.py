"""Pickles from strangers, read by an interpreter that can run nothing.

Python's own unpickler imports and calls whatever a file names. This one goes through the opcodes one by one: a name
means one of the values its caller hands in, or a `Refused`, which does nothing. Nothing here imports, looks up an
attribute or calls anything else, so there is nothing to escape from. The work that a file can ask for is bounded too.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from marjax.errors import shortened

# Far above what the largest checkpoint needs, far below what would fill the memory or take minutes.
MAX_WORK = 4_000_000  # see Budget
MAX_STRING = 1 << 26  # bytes of all strings together
_CALL = 20  # units of work: what a call makes is larger than what an opcode makes
_PART = 32  # bytes of a string that are a unit of work for whoever goes through it
_MAX_BITS = 128  # of an integer; PyTorch's magic number has 77
_MAX_NAME = 1000  # characters of a key, or of the name of a class
_MAX_KEY = 1 << 16  # integers that are keys stay below, so that they cannot be chosen to collide

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    (
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    )
)
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ABSENT = object()


class PickleError(ValueError):
    """A pickle that is damaged or refused; the text says why, beginning with a verb ("asks for ...")."""


@dataclasses.dataclass(frozen=True)
class Function:
    """A value that a file may call, with positional arguments; it raises PickleError for those it does not expect."""

    call: Callable[..., Any]


class Refused:
    """Stands for an object of a class, or the result of a function, that the reader does not know.

    Nothing is imported or called for it, and nothing that the pickle puts into it is kept.

    Attributes:
      name: of the class or function, "module.name".
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Budget:
    """The work that may go into one file, in units of about one opcode; pickles of one file share it."""

    def __init__(self) -> None:
        self.work, self.strings = MAX_WORK, MAX_STRING

    def spend(self, units: int) -> None:
        """Raises PickleError: the file asks for more work than any list of tensors does."""
        self.work -= units
        if self.work < 0:
            raise PickleError(f"takes more than {MAX_WORK} steps, so it is no list of tensors")

    def read(self, size: int) -> None:
        """Counts bytes of strings. Raises PickleError: they are too many."""
        if size > self.strings:
            raise PickleError(
                f"holds a string of {size} bytes, of at most {MAX_STRING} in all, so it is no list of tensors"
            )
        self.strings -= max(0, size)


def load(
    file: BinaryIO,
    known: Mapping[tuple[str, str], Any],
    builders: Mapping[type, Callable[[Any, Any], None]],
    persistent: Callable[[Any], Any],
    *,
    refused: Callable[[str], Refused] = Refused,
    budget: Budget | None = None,
) -> Any:
    """The object of the pickle at the file's position, which then is behind it.

    Dicts, lists, tuples, strings, bytes, numbers, booleans and None are what they are. A key that is neither a string
    nor a small integer becomes a `Refused`, and so do sets.

    Args:
      file: open for reading bytes.
      known: (module, name) -> what the file gets for it; a Function can be called, anything else is a mere value.
      builders: type -> function of (object, state) for objects that the file completes by a state.
      persistent: from a persistent id to its object.
      refused: what a name that is not known stands for, from "module.name".
      budget: of this file; by default a new one.

    Raises:
      PickleError: the pickle is damaged, takes too much work, or asks for what is neither known nor inert.
    """
    budget = budget or Budget()
    machine = _Machine(known, builders, persistent, refused, budget)
    # A hostile pickle may make genops raise almost anything of its own, but it does nothing but decode.
    opcodes = pickletools.genops(_Bounded(file, budget))  # type: ignore[arg-type]
    while True:
        budget.spend(1)
        try:
            opcode, argument, _ = next(opcodes)
        except PickleError:
            raise
        except (ValueError, ArithmeticError, LookupError, StopIteration) as error:
            reason = " ".join(str(error).replace("at position None, ", "").split())
            raise PickleError(f"breaks off or is damaged ({shortened(reason, 100)})") from None
        if opcode.name == "STOP":
            return machine.pop()
        machine.run(opcode.name, argument)


class _Bounded:
    """A file whose reads are bounded, however long the file says that a string is."""

    def __init__(self, file: BinaryIO, budget: Budget) -> None:
        self.file, self.budget = file, budget

    def read(self, size: int) -> bytes:
        if size > 8:
            self.budget.read(size)
        return self.file.read(size)

    def readline(self) -> bytes:
        line = self.file.readline(1 << 16)
        self.budget.read(len(line))
        return line


class _Machine:
    """The pickle machine: a stack, the stacks below each mark, and a memo."""

    def __init__(
        self,
        known: Mapping[tuple[str, str], Any],
        builders: Mapping[type, Callable[[Any, Any], None]],
        persistent: Callable[[Any], Any],
        refused: Callable[[str], Refused],
        budget: Budget,
    ) -> None:
        self.known, self.builders, self.persistent = known, builders, persistent
        self.refused, self.budget = refused, budget
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        # A list: the numbers in a dict could be chosen to collide.
        self.memo: list[Any] = []

    def pop(self) -> Any:
        if not self.stack:
            raise PickleError("is damaged (its stack is empty)")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """The object on top of the stack, which must be of exactly that type."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise PickleError(f"is damaged (a {kind.__name__} was expected)")
        return self.stack[-1]

    def add(self, kind: type, items: list[Any]) -> None:
        """Puts items into the list or dict on top of the stack; what a `Refused` holds is not kept."""
        if self.stack and isinstance(self.stack[-1], Refused):
            return
        if kind is list:
            self.top(list).extend(items)
        else:
            self.top(dict).update(self.as_dict(items))

    def as_dict(self, items: list[Any]) -> dict[Any, Any]:
        return as_dict(items, self.refused)

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise PickleError("is damaged (there is no mark)")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def run(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                raise PickleError(f"holds a number of {argument.bit_length()} bits, so it is no list of tensors")
            self.stack.append(argument)
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
            return
        if name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(reversed(items)))
            return
        match name:
            case "PROTO":
                if argument > 5:
                    raise PickleError(f"has pickle protocol {argument}; this program knows those up to 5")
            case "FRAME":
                pass
            case "MARK":
                self.marks.append(self.stack)
                self.stack = []
            case "POP":
                if self.stack:
                    self.stack.pop()
                else:
                    self.pop_to_mark()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                self.stack.append(self.pop())
                self.stack.append(self.stack[-1])
            case "TUPLE" | "LIST" | "DICT":
                items = self.pop_to_mark()  # first: it is another stack that then is on top
                self.stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else self.as_dict(items))
            case "EMPTY_LIST":
                self.stack.append([])
            case "APPEND":
                self.add(list, [self.pop()])
            case "APPENDS":
                items = self.pop_to_mark()
                self.add(list, items)
            case "EMPTY_DICT":
                self.stack.append({})
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.add(dict, [key, value])
            case "SETITEMS":
                items = self.pop_to_mark()
                self.add(dict, items)
            case "EMPTY_SET":
                self.stack.append(self.refused("builtins.set"))
            case "FROZENSET":
                self.pop_to_mark()
                self.stack.append(self.refused("builtins.frozenset"))
            case "ADDITEMS":
                self.pop_to_mark()
                self.pop_refused("adds items to")
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.put(argument)
            case "MEMOIZE":
                self.put(len(self.memo))
            case "GET" | "BINGET" | "LONG_BINGET":
                if not 0 <= argument < len(self.memo) or self.memo[argument] is _ABSENT:
                    raise PickleError("is damaged (it refers to an object that it has not)")
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                self.stack.append(self.find(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                self.stack.append(self.find(module, attribute))
            case "INST":
                self.pop_to_mark()
                module, _, attribute = argument.partition(" ")
                self.stack.append(self.refused(self.name_of(module, attribute)))
            case "OBJ":
                items = self.pop_to_mark()
                self.stack.append(self.call(items[0] if items else None, tuple(items[1:])))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                self.stack.append(self.call(function, arguments))
            case "NEWOBJ_EX":
                keywords, arguments, function = self.pop(), self.pop(), self.pop()
                if type(keywords) is not dict or (keywords and not isinstance(function, Refused)):
                    raise PickleError("is damaged (a function with arguments by name)")
                self.stack.append(self.call(function, arguments))
            case "BUILD":
                state = self.pop()
                target = self.pop()
                if not isinstance(target, Refused):
                    if type(target) not in self.builders:
                        raise PickleError(f"sets the state of a {type(target).__name__}, which is refused")
                    self.budget.spend(_size(state))
                    self.builders[type(target)](target, state)
                self.stack.append(target)
            case "BINPERSID" | "PERSID":
                self.budget.spend(_CALL)
                self.stack.append(self.persistent(self.pop() if name == "BINPERSID" else argument))
            case _:
                raise PickleError(f"uses the pickle opcode {name}, which is refused")

    def put(self, index: int) -> None:
        if not 0 <= index < MAX_WORK:
            raise PickleError(f"is damaged (it numbers an object {index})")
        value = self.pop()
        self.stack.append(value)
        self.memo += [_ABSENT] * (index - len(self.memo) + 1)
        self.memo[index] = value

    def pop_refused(self, doing: str) -> None:
        if not self.stack or not isinstance(self.stack[-1], Refused):
            raise PickleError(f"is damaged (it {doing} something else than a set)")

    def name_of(self, module: Any, name: Any) -> str:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("is damaged (a name that is no text)")
        if len(module) + len(name) > _MAX_NAME:
            raise PickleError(f"asks for a name of {len(module) + len(name)} characters, which no class has")
        return f"{module}.{name}"

    def find(self, module: Any, name: Any) -> Any:
        whole = self.name_of(module, name)
        found = self.known.get((module, name), _ABSENT)
        return self.refused(whole) if found is _ABSENT else found

    def call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Refused):
            self.budget.spend(_CALL)
            return self.refused(function.name)
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise PickleError("calls something that is no function, which is refused")
        # A function goes through its arguments and theirs at most, and what it returns is no larger than these.
        self.budget.spend(_CALL + sum(_size(each) for each in arguments))
        try:
            return function.call(*arguments)
        except TypeError:
            raise PickleError("is damaged (a function with other arguments than it takes)") from None


def as_dict(items: list[Any], refused: Callable[[str], Refused] = Refused) -> dict[Any, Any]:
    """{k: v} from [k, v, k, v].

    Strings, small integers and None are keys as they are, and a `Refused` is. The hash of anything else may take for
    ever, or be the same for all of them, so its place is taken by a `Refused`, which is like no other.

    Raises:
      PickleError: an odd number of items.
    """
    if len(items) % 2:
        raise PickleError("is damaged (a dict with a key that has no value)")
    return {
        key if _is_key(key) else refused(f"builtins.{type(key).__name__}"): value
        for key, value in zip(items[::2], items[1::2], strict=True)
    }


def _is_key(key: Any) -> bool:
    if type(key) is str:
        return len(key) <= _MAX_NAME  # equal strings are compared as a whole
    return key is None or isinstance(key, Refused) or (type(key) is int and -_MAX_KEY < key < _MAX_KEY)


def _size(value: Any) -> int:
    """Units of work to go through a value."""
    if isinstance(value, list | tuple | dict):
        return len(value)
    return len(value) // _PART if isinstance(value, str | bytes) else 0
