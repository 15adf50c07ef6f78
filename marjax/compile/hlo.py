"""What a compiled program does, read from its HLO text: matrix products, collectives, memory traffic.

The program is walked from its entry. What a `while` holds counts as often as the loop runs, which its condition says;
of a conditional's branches the dearest counts; what a fusion holds counts once, and its operands and results are what
it moves through memory. Nothing here needs JAX.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_SLICES = ("dynamic-slice", "slice", "gather", "dynamic-update-slice")  # of their first operand
# Of float32 products, by precision: how often a TPU's matrix unit multiplies parts of the operands in bfloat16.
_PASSES = {"default": 1, "high": 3, "highest": 6}
# No work of their own: names for buffers, or a later part of what was counted at its start.
_FREE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "domain",
    "while",
    "conditional",
    "call",
    "async-update",
}
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}  # of custom-call
# Memory spaces of a core's own memory: 1 is the vector memory. That 3 is v4's 128 MiB of CMEM is inferred: only
# programs for v4 name it, have up to 128 MiB there and no more, and copy to it what the others copy to 1.
_ON_CHIP = ("S(1)", "S(3)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type; `on_chip` where the layout says it lies in a core's own memory."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.size * _BYTES.get(self.dtype, 0)


@dataclasses.dataclass
class Instruction:
    """A line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    arrays: tuple[Array, ...]  # its type, a tuple's flattened
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def source(self) -> str:
        """Where in the traced program it comes from, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b(?:{attribute})=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """The computations of which a conditional runs one."""
        if found := re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes):
            return [name.strip().removeprefix("%") for name in found[1].split(",")]
        return [name for key in ("true_computation", "false_computation") if (name := self.called(key))]


class Computation(dict[str, Instruction]):
    """The instructions of a computation by name, in their order."""

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


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective as it appears in the program.

    `bytes` is what one device sends over its links each time, by the ring algorithm, and `times` how often it runs.
    """

    kind: str
    dtype: str
    group: int  # devices that take part in one
    bytes: float
    times: int
    source: str
    overlapped: bool  # runs beside other work: the compiler made it asynchronous

    @property
    def total(self) -> float:
        return self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class Operation:
    """A top-level instruction: FLOPs of its matrix products, bytes it moves between HBM and core, how often it runs.

    `passes` are FLOPs with those of float32 products counted as often as the matrix unit goes over them in bfloat16.
    `cycles` is the TPU compiler's own estimate, 0 where it gives none. `overlapped` ones run beside others: copies that
    were started ahead of their use.
    """

    name: str
    opcode: str
    flops: float
    passes: float
    bytes: float
    cycles: int
    times: int
    source: str
    overlapped: bool = False


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution, with the dtypes of its operands."""

    dtypes: tuple[str, ...]
    flops: float
    times: int
    source: str
    passes: int = 1  # over the operands in bfloat16 that a TPU's matrix unit makes


@dataclasses.dataclass(frozen=True)
class Program:
    """All that `read` finds, of one device."""

    collectives: tuple[Collective, ...]
    operations: tuple[Operation, ...]
    products: tuple[Product, ...]
    unread: tuple[str, ...] = ()  # names of loops that count once, since how often they run could not be read

    @property
    def flops(self) -> float:
        """Of matrix products, multiply and add being two, recomputation and padding included."""
        return sum(each.flops * each.times for each in self.products)

    @property
    def bytes(self) -> float:
        """Moved between HBM and the core."""
        return sum(each.bytes * each.times for each in self.operations)

    def flops_by_dtype(self) -> dict[str, float]:
        """FLOPs by the widest operand's dtype."""
        totals: dict[str, float] = {}
        for each in self.products:
            widest = max(each.dtypes, key=lambda dtype: _BYTES.get(dtype, 0))
            totals[widest] = totals.get(widest, 0.0) + each.flops * each.times
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def collective_bytes(self) -> dict[str, float]:
        """What a device sends in one run of the program, by kind."""
        totals: dict[str, float] = {}
        for each in self.collectives:
            totals[each.kind] = totals.get(each.kind, 0.0) + each.total
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def ring_bytes(kind: str, group: int, result_bytes: float) -> float:
    """What each device sends when `group` devices run a collective in a ring.

    Args:
      kind: one of COLLECTIVES.
      group: devices in the ring; 1 sends nothing.
      result_bytes: of what each device has afterwards.
    """
    share = (group - 1) / group
    if kind == "all-reduce":  # a reduce-scatter and an all-gather
        return 2 * share * result_bytes
    if kind == "reduce-scatter":  # the result is one part of `group`
        return (group - 1) * result_bytes
    if kind in ("collective-permute", "collective-broadcast"):
        return result_bytes if group > 1 else 0.0
    return share * result_bytes


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a module's text by name, and the name of its entry.

    Raises:
      ValueError: no entry.
    """
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


def read(text: str, num_devices: int) -> Program:
    """Walks a compiled module of `num_devices` devices from its text. Raises ValueError: not HLO text."""
    computations, entry = parse(text)
    walk = _Walk(computations, num_devices)
    walk.run(entry, 1)
    return Program(tuple(walk.collectives), tuple(walk.operations), tuple(walk.products), tuple(walk.unread))


class _Walk:
    def __init__(
        self, computations: dict[str, Computation], num_devices: int, chains: frozenset[tuple[str, int]] = frozenset()
    ) -> None:
        self.computations, self.num_devices = computations, num_devices
        self.collectives: list[Collective] = []
        self.operations: list[Operation] = []
        self.products: list[Product] = []
        self.unread: list[str] = []
        self.chains = set(chains)  # of collectives spread over several fusions, by name and runs

    def run(self, name: str, times: int) -> None:
        computation = self.computations[name]
        for each in computation.values():
            if each.opcode == "while":
                body = each.called("body")
                assert body
                self.run(body, times * self.trips(each, computation))
            elif each.opcode == "call" and (called := each.called("to_apply")):
                self.run(called, times)
            elif each.opcode == "conditional":
                self.dearest(each.branches, times)
            if each.opcode in _FREE or each.opcode.endswith("-done") or _target(each) in _FREE_CALLS:
                continue
            first = len(self.products)
            flops = self.inside(each, computation, times)
            passes = sum(one.flops * one.passes for one in self.products[first:])
            moved = self.traffic(each, computation)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', each.attributes)
            self.operations.append(
                Operation(
                    each.name,
                    each.opcode,
                    flops,
                    passes,
                    moved,
                    int(cycles[1]) if cycles else 0,
                    times,
                    each.source,
                    each.opcode.endswith("-start") and not flops,
                )
            )

    def dearest(self, branches: Sequence[str], times: int) -> None:
        """Notes what the branch holds that takes the most cycles; the most products or traffic, where none are told."""
        walks = []
        for branch in branches:
            walks.append(_Walk(self.computations, self.num_devices, frozenset(self.chains)))
            walks[-1].run(branch, times)
        chosen = max(walks, key=_Walk.cost, default=None)
        if chosen is not None:
            self.collectives += chosen.collectives
            self.operations += chosen.operations
            self.products += chosen.products
            self.unread += chosen.unread
            self.chains = chosen.chains

    def cost(self) -> tuple[float, float, float]:
        """Cycles, passes of products, and bytes that are moved or sent."""
        return (
            sum(each.cycles * each.times for each in self.operations),
            sum(each.passes * each.times for each in self.operations),
            sum(each.bytes * each.times for each in self.operations) + sum(each.total for each in self.collectives),
        )

    def inside(self, each: Instruction, computation: Computation, times: int) -> float:
        """FLOPs of an instruction and all that it calls; notes products and collectives."""
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # What a TPU overlaps with its work stands in every fusion that it overlaps with, under one channel.
            chain = re.search(r'chain_id="(\d+)"', each.attributes)
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            if chain and channel:  # spread over the fusions
                if (name := f"{chain[1]}/{channel[1]}", times) in self.chains:
                    return 0.0
                self.chains.add((name, times))
            self.collectives.append(self.collective(kind, each, computation, times))
            return 0.0
        if each.opcode in ("dot", "convolution"):
            arrays = [computation[name].arrays[0] for name in each.operands[:2]]
            flops = _product_flops(each, *arrays)
            dtypes = tuple(self.stored_dtype(name, computation) for name in each.operands[:2])
            wide = "f32" in (array.dtype for array in arrays)
            precision = re.search(r"operand_precision=\{(\w+)", each.attributes)
            passes = _PASSES.get(precision[1] if precision else "default", 1) if wide else 1
            self.products.append(Product(dtypes, flops, times, each.source, passes))
            return flops
        if each.opcode in ("fusion", "async-start", "call") and (called := each.called("calls|to_apply")):
            inner, first = self.computations[called], len(self.collectives)
            flops = sum(self.inside(one, inner, times) for one in inner.values())
            if each.opcode == "async-start":
                self.collectives[first:] = [
                    dataclasses.replace(one, overlapped=True) for one in self.collectives[first:]
                ]
            if "all-reduce-scatter" in called:  # how a TPU's compiler writes a reduce-scatter: and then a slice
                self.collectives[first:] = [
                    dataclasses.replace(one, kind="reduce-scatter", bytes=one.bytes / 2, source=each.source)
                    for one in self.collectives[first:]
                ]
            return flops
        return 0.0

    def stored_dtype(self, name: str, computation: Computation) -> str:
        """The dtype of an operand, that of its source where it was only widened on the way to the matrix unit."""
        each = computation[name]
        if each.opcode == "convert" and each.operands[0] in computation:
            source = computation[each.operands[0]].arrays[0]
            return min(source, each.arrays[0], key=lambda array: _BYTES.get(array.dtype, 0)).dtype
        return each.arrays[0].dtype

    def collective(self, kind: str, each: Instruction, computation: Computation, times: int) -> Collective:
        arrays = each.arrays
        if each.opcode.endswith("-start") and kind != "all-reduce":
            # (operands, results, ...): as many results as operands.
            operands = len(each.operands)
            arrays = arrays[operands : 2 * operands]
        group = _group_size(each.attributes, self.num_devices)
        total = sum(array.bytes for array in arrays)
        overlapped = each.opcode.endswith("-start") or "chain_id=" in each.attributes
        return Collective(kind, arrays[0].dtype, group, ring_bytes(kind, group, total), times, each.source, overlapped)

    def trips(self, loop: Instruction, outer: Computation) -> int:
        """How often a while runs: what the compiler noted, or what follows from its counter's limit, start and step.

        A loop that does not count from a constant to a constant is noted as unread and counts once.
        """
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if noted:
            return int(noted[1])
        condition, body = (self.computations[loop.called(name) or ""] for name in ("condition", "body"))
        compared = [condition[name] for name in condition.root.operands if name in condition]
        limit = next((value for one in compared if (value := _integer(one)) is not None), None)
        place = next((_place(one) for one in compared if one.opcode == "get-tuple-element"), -1)
        start = _integer(self.element(outer, loop.operands[0], place))
        after = self.element(body, body.root.name, place)
        step = next(
            (
                value
                for name in (after.operands if after is not None and after.opcode == "add" else ())
                if (value := _integer(body.get(name))) is not None
            ),
            None,
        )
        if limit is None or start is None or not step or step < 0 or "direction=LT" not in condition.root.attributes:
            self.unread.append(loop.name)
            return 1
        return max(0, -(-(limit - start) // step))

    def element(self, computation: Computation, name: str, place: int) -> Instruction | None:
        """What a tuple of a computation holds at a place, copies looked through; None if that is not to be seen."""
        whole = computation.get(name)
        if whole is None or whole.opcode != "tuple" or not 0 <= place < len(whole.operands):
            return None
        found = computation.get(whole.operands[place])
        while found is not None and found.opcode in ("copy", "bitcast", "convert"):
            found = computation.get(found.operands[0])
        return found

    def traffic(self, each: Instruction, computation: Computation) -> float:
        """Bytes that an instruction reads from and writes to HBM."""
        if each.opcode.removesuffix("-start") in COLLECTIVES:
            return 0.0
        if each.opcode == "async-start" and (called := each.called("calls")):
            return self.wrapped_traffic(self.computations[called])
        if each.opcode.endswith("-start"):  # a copy between HBM and a core's memory, or within HBM
            ends = each.arrays[:2]
            moved = min((array.bytes for array in ends), default=0.0)
            return moved * sum(not array.on_chip for array in ends)
        if each.opcode == "fusion" and (called := each.called("calls")):
            return self.fusion_traffic(each, self.computations[called], computation)
        read = {name: computation[name].arrays for name in each.operands if name in computation}
        if each.opcode in ("dynamic-slice", "slice", "gather"):
            return self.between(each.arrays, read.get(each.operands[0], ()))
        if each.opcode == "dynamic-update-slice":
            return self.between(read.get(each.operands[1], ()), each.arrays)
        return sum(array.bytes for arrays in (*read.values(), each.arrays) for array in arrays if not array.on_chip)

    def between(self, part: Sequence[Array], whole: Sequence[Array]) -> float:
        """Of a part that is copied out of a whole, or into it."""
        return sum(array.bytes * ((not array.on_chip) + (not whole[0].on_chip)) for array in part[:1]) if whole else 0.0

    def wrapped_traffic(self, inner: Computation) -> float:
        """Of what an asynchronous instruction starts. The sparse cores' gathers read as much as they write."""
        moved = 0.0
        for each in inner.values():
            if each.opcode in ("call", "custom-call"):
                moved += sum(2 * array.bytes for array in each.arrays if not array.on_chip)
            elif each.opcode not in _FREE:
                moved += self.traffic(each, inner)
        return moved

    def fusion_traffic(self, each: Instruction, inner: Computation, outer: Computation) -> float:
        moved = 0.0
        for name, parameter in zip(each.operands, inner.parameters, strict=False):
            if name not in outer or not outer[name].arrays or outer[name].arrays[0].on_chip:
                continue
            array, users = outer[name].arrays[0], inner.users.get(parameter.name, [])
            if users and all(user.opcode in _SLICES and user.operands[0] == parameter.name for user in users):
                # Only the slices are read; what is updated in place is not read at all.
                moved += sum(user.arrays[0].bytes for user in users if user.opcode != "dynamic-update-slice")
            else:
                moved += array.bytes
        updates = [one for one in inner.values() if one.opcode == "dynamic-update-slice"]
        for array in each.arrays:
            if array.on_chip:
                continue
            into = next((one for one in updates if one.arrays[0].shape == array.shape), None)
            moved += array.bytes if into is None else inner[into.operands[1]].arrays[0].bytes
        return moved


def _integer(each: Instruction | None) -> int | None:
    """The value of an integer constant."""
    if each is None or each.opcode != "constant" or each.arrays[0].dtype not in ("s32", "u32", "s64", "u64"):
        return None
    return int(each.attributes) if each.attributes.isdigit() else None


def _target(each: Instruction) -> str:
    """What a custom-call calls; "" of others."""
    found = re.search(r'custom_call_target="([^"]*)"', each.attributes) if each.opcode == "custom-call" else None
    return found[1] if found else ""


def _place(each: Instruction) -> int:
    """Which element of its tuple a get-tuple-element takes."""
    found = re.search(r"\bindex=(\d+)", each.attributes)
    return int(found[1]) if found else 0


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
    """What the parenthesis that `text` starts with holds, and what follows it."""
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


def _group_size(attributes: str, num_devices: int) -> int:
    """How many devices take part in each group of a collective."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        chosen = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in chosen)
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        pairs = re.findall(r"\{(\d+),(\d+)", found[0])
        return max(1, len({device for pair in pairs if pair[0] != pair[1] for device in pair}))
    return num_devices


def _product_flops(each: Instruction, left: Array, right: Array) -> float:
    """Two for every multiply that a dot or convolution needs; where padding or dilation put zeros, none."""
    if each.opcode == "dot":
        contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
        axes = [int(axis) for axis in contracting[1].split(",") if axis] if contracting else []
        return 2.0 * each.arrays[0].size * math.prod(left.shape[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        return 0.0
    image, kernel, out = labels.groups()
    result = each.arrays[0].shape
    spatial = sorted(label for label in image if label.isdigit())  # as the window's numbers come
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", each.attributes) or ["", ""])[1]))
    size = [int(part) for part in window.get("size", "").split("x") if part] or [1] * len(spatial)

    def each_axis(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    valid = 1.0
    for i, label in enumerate(spatial):
        low = int(each_axis("pad", "0_0")[i].split("_")[0])
        valid *= _valid_positions(
            left.shape[image.index(label)],
            size[i],
            result[out.index(label)],
            low,
            int(each_axis("stride", "1")[i]),
            int(each_axis("lhs_dilate", "1")[i]),
            int(each_axis("rhs_dilate", "1")[i]),
        )
    outside = result[out.index("b")] * result[out.index("f")]
    return 2.0 * outside * right.shape[kernel.index("i")] * valid


@functools.cache
def _valid_positions(length: int, size: int, outputs: int, low: int, stride: int, dilate: int, spread: int) -> int:
    """Pairs of an output and a window position that meet a value of the input, along one axis."""
    last = (length - 1) * dilate
    count = 0
    for out in range(outputs):
        for tap in range(size):
            at = out * stride + tap * spread - low
            count += 0 <= at <= last and at % dilate == 0
    return count
