"""HLO text as computations of instructions. Needs no JAX."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
# On-chip memory spaces: 1 is the vector memory. That 3 is v4's 128 MiB of CMEM is inferred: only programs for v4 use
# it, with at most 128 MiB, for what other programs copy to 1.
_ON_CHIP = ("S(1)", "S(3)")


def itemsize(dtype: str) -> float:
    """Bytes per value; 0 for types without data, such as tokens."""
    return _BYTES.get(dtype, 0)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type; `on_chip` if the layout says it is in on-chip memory."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.size * itemsize(self.dtype)


@dataclasses.dataclass
class Instruction:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    arrays: tuple[Array, ...]  # the result; tuples are flattened
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def source(self) -> str:
        """Its operation in the traced program, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b(?:{attribute})=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """The branch computations of a conditional."""
        if found := re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes):
            return [name.strip().removeprefix("%") for name in found[1].split(",")]
        return [name for key in ("true_computation", "false_computation") if (name := self.called(key))]


class Computation(dict[str, Instruction]):
    """The instructions of a computation by name, in program order."""

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        found = [each for each in self.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.operands[0]))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for each in self.values():
            for operand in each.operands:
                users.setdefault(operand, []).append(each)
        return users

    @property
    def root(self) -> Instruction:
        return next(each for each in self.values() if each.is_root)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns all computations of a module by name, and the name of its entry. Raises ValueError: no entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            if line.endswith("{") and "->" in line:
                name = _OPERAND.search(line.split("(")[0]) or re.search(r"(?:ENTRY )?([\w.\-]+) ", line)
                assert name is not None
                current = computations[name[1]] = Computation()
                if line.startswith("ENTRY"):
                    entry = name[1]
            elif line.startswith("}"):
                current = None
            continue
        found = _INSTRUCTION.match(line)
        if found:
            instruction = _instruction(found[2], bool(found[1]), line[found.end() :])
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY in this HLO text")
    return computations, entry


def _instruction(name: str, is_root: bool, rest: str) -> Instruction:
    kind, rest = _split_type(rest)
    opcode, _, rest = rest.strip().partition("(")
    inside, attributes = _balanced("(" + rest)
    if opcode == "constant":
        return Instruction(name, kind, opcode, (), inside.strip(), is_root)
    operands = (inside,) if opcode == "parameter" else tuple(_OPERAND.findall(inside))
    return Instruction(name, kind, opcode, operands, attributes, is_root)


def _split_type(text: str) -> tuple[tuple[Array, ...], str]:
    if text.startswith("("):
        inside, rest = _balanced(text)
        return tuple(_arrays(inside)), rest
    kind, _, rest = text.partition(" ")
    return tuple(_arrays(kind)), rest


def _balanced(text: str) -> tuple[str, str]:
    """Splits `text` at the end of its leading parentheses: their contents, and the rest."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return text[1:i], text[i + 1 :]
    return text[1:], ""


def _arrays(text: str) -> Iterator[Array]:
    for dtype, shape, layout in _ARRAY.findall(text):
        sizes = tuple(int(size.replace("<=", "")) for size in shape.split(",") if size)
        yield Array(dtype, sizes, any(space in layout for space in _ON_CHIP))
