"""Pickles from strangers, read by an interpreter that can run nothing.

Python's own unpickler imports and calls whatever a file names. This one goes through the opcodes one by one: a name
means one of the values its caller hands in, or the file is refused by that name. Nothing here imports, looks up an
attribute or calls anything else, so there is nothing to escape from.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

# Far above what the largest checkpoint needs, far below what would fill the memory: an opcode makes one small object,
# but for calls, and what these make is counted.
MAX_OPCODES = 5_000_000
MAX_MADE = 1 << 27  # bytes that all calls together may make, at 128 for an element of a container
MAX_STRING = 1 << 26  # bytes
_MAX_BITS = 128  # of an integer; PyTorch's magic number has 77

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8"))
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = (str, int, float, type(None))  # of dicts: the hash of nested tuples can take for ever


class PickleError(ValueError):
    """A pickle that is damaged or refused; the text says why, beginning with a verb ("asks for ...")."""


@dataclasses.dataclass(frozen=True)
class Function:
    """A value that a file may call, with positional arguments; it raises PickleError for those it does not expect."""

    call: Callable[..., Any]


def load(file: BinaryIO, known: Mapping[tuple[str, str], Any], builders: Mapping[type, Callable[[Any, Any], None]],
         persistent: Callable[[Any], Any]) -> Any:
    """The object of the pickle at the file's position, which then is behind it.

    Dicts (of strings and numbers), lists, tuples, strings, bytes, numbers, booleans and None are what they are.

    Args:
      file: open for reading bytes.
      known: (module, name) -> what the file gets for it; a Function can be called, anything else is a mere value.
      builders: type -> function of (object, state) for objects that the file completes by a state.
      persistent: from a persistent id to its object.

    Raises:
      PickleError: the pickle is damaged, or asks for anything else.
    """
    machine = _Machine(known, builders, persistent)
    # A hostile pickle may make genops raise almost anything of its own, but it does nothing but decode.
    opcodes = pickletools.genops(_Bounded(file))  # type: ignore[arg-type]
    for _ in range(MAX_OPCODES):
        try:
            opcode, argument, _ = next(opcodes)
        except PickleError:
            raise
        except (ValueError, ArithmeticError, LookupError, StopIteration) as error:
            reason = " ".join(str(error).replace("at position None, ", "").split())
            raise PickleError(f"breaks off or is damaged ({reason[:100]})") from None
        if opcode.name == "STOP":
            return machine.pop()
        machine.run(opcode.name, argument)
    raise PickleError(f"has more than {MAX_OPCODES} opcodes, so it is no list of tensors")


class _Bounded:
    """A file whose single reads are bounded, however long the file says that a string is."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int) -> bytes:
        if size > MAX_STRING:
            raise PickleError(f"holds a string of {size} bytes, so it is no list of tensors")
        return self.file.read(size)

    def readline(self) -> bytes:
        return self.file.readline(1 << 16)


class _Machine:
    """The pickle machine: a stack, the stacks below each mark, and a memo."""

    def __init__(self, known: Mapping[tuple[str, str], Any], builders: Mapping[type, Callable[[Any, Any], None]],
                 persistent: Callable[[Any], Any]) -> None:
        self.known, self.builders, self.persistent = known, builders, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.made = 0  # see MAX_MADE

    def pop(self) -> Any:
        if not self.stack:
            raise PickleError("is damaged (its stack is empty)")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """The object on top of the stack, which must be of exactly that type."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise PickleError(f"is damaged (a {kind.__name__} was expected)")
        return self.stack[-1]

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
                self.stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else as_dict(items))
            case "EMPTY_LIST":
                self.stack.append([])
            case "APPEND":
                item = self.pop()
                self.top(list).append(item)
            case "APPENDS":
                items = self.pop_to_mark()
                self.top(list).extend(items)
            case "EMPTY_DICT":
                self.stack.append({})
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.top(dict).update(as_dict([key, value]))
            case "SETITEMS":
                items = self.pop_to_mark()
                self.top(dict).update(as_dict(items))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.pop()
                self.stack.append(self.memo[argument])
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.pop()
                self.stack.append(self.memo[len(self.memo) - 1])
            case "GET" | "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise PickleError("is damaged (it refers to an object that it has not)")
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                self.stack.append(self.find(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                self.stack.append(self.find(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                self.stack.append(self.call(function, arguments))
            case "BUILD":
                state = self.pop()
                target = self.pop()
                if type(target) not in self.builders:
                    raise PickleError(f"sets the state of a {type(target).__name__}, which is refused")
                self.builders[type(target)](target, state)
                self.stack.append(target)
            case "BINPERSID" | "PERSID":
                self.stack.append(self.persistent(self.pop() if name == "BINPERSID" else argument))
            case _:
                raise PickleError(f"uses the pickle opcode {name}{_shown(argument)}, which is refused")

    def find(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("is damaged (a name that is no text)")
        if (module, name) not in self.known:
            raise PickleError(f"asks for {f'{module}.{name}'[:120]!r}, which is not among the names that a file of "
                              f"weights needs, so it is refused and nothing of it was run")
        return self.known[module, name]

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise PickleError("calls something that is no function, which is refused")
        try:
            made = function.call(*arguments)
        except TypeError:
            raise PickleError("is damaged (a function with other arguments than it takes)") from None
        if isinstance(made, str | bytes):
            self.made += len(made)
        elif isinstance(made, dict | list | tuple):
            self.made += 128 * len(made)
        if self.made > MAX_MADE:
            raise PickleError(f"makes objects of more than {MAX_MADE >> 20} MiB, so it is no list of tensors")
        return made


def as_dict(items: list[Any]) -> dict[Any, Any]:
    """{k: v} from [k, v, k, v].

    Raises:
      PickleError: an odd number of them, or a key that is no string, number or None.
    """
    if len(items) % 2 or not all(isinstance(key, _KEYS) for key in items[::2]):
        raise PickleError("is damaged (a dict with keys that are neither strings nor numbers)")
    return dict(zip(items[::2], items[1::2], strict=True))


def _shown(argument: Any) -> str:
    return f" ({argument[:120].replace(' ', '.')!r})" if isinstance(argument, str) else ""
