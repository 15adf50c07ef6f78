"""The cost of a compiled program from its HLO text: matrix products, collectives, memory traffic. Needs no JAX.

The program is walked from its entry. The body of a `while` counts once per iteration, and the number of iterations is
read from its condition; of a conditional, the most expensive branch counts; a fusion counts once, and its operands and
results are its memory traffic.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

from marjax.compile.hlo_text import Array, Computation, Instruction, itemsize, parse

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_SLICES = ("dynamic-slice", "slice", "gather", "dynamic-update-slice")  # their first operand is sliced
# bfloat16 passes of a TPU's matrix unit over a float32 product, by precision.
_PASSES = {"default": 1, "high": 3, "highest": 6}
# No work of their own: names of buffers, or the end of an asynchronous instruction that is counted at its start.
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
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}  # targets of custom-call


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective in the program. A device sends `bytes` each of the `times` it runs, by the ring algorithm."""

    kind: str
    dtype: str
    group: int  # devices per group
    bytes: float
    times: int
    source: str
    overlapped: bool  # asynchronous: runs beside other work

    @property
    def total(self) -> float:
        return self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class Operation:
    """A top-level instruction: FLOPs of its matrix products, HBM traffic in bytes, and number of runs.

    `passes` are the FLOPs, with float32 products weighted by their number of bfloat16 passes. `cycles` is the TPU
    compiler's estimate, 0 if it gives none. `overlapped` copies are started ahead of their use and run beside others.
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
    """A matrix product or convolution, and the dtypes of its operands."""

    dtypes: tuple[str, ...]
    flops: float
    times: int
    source: str
    passes: int = 1  # in bfloat16, by the matrix unit


@dataclasses.dataclass(frozen=True)
class Program:
    """The cost of a program on one device."""

    collectives: tuple[Collective, ...]
    operations: tuple[Operation, ...]
    products: tuple[Product, ...]
    unread: tuple[str, ...] = ()  # loops with an unknown number of iterations, which count once

    @property
    def flops(self) -> float:
        """FLOPs of matrix products, with recomputation and padding; a multiply-add is two."""
        return sum(each.flops * each.times for each in self.products)

    @property
    def bytes(self) -> float:
        """HBM traffic in bytes."""
        return sum(each.bytes * each.times for each in self.operations)

    def flops_by_dtype(self) -> dict[str, float]:
        """FLOPs by the dtype of the widest operand, largest first."""
        totals: dict[str, float] = {}
        for each in self.products:
            widest = max(each.dtypes, key=lambda dtype: itemsize(dtype))
            totals[widest] = totals.get(widest, 0.0) + each.flops * each.times
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def collective_bytes(self) -> dict[str, float]:
        """Bytes that a device sends in one run of the program, by kind of collective, largest first."""
        totals: dict[str, float] = {}
        for each in self.collectives:
            totals[each.kind] = totals.get(each.kind, 0.0) + each.total
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def ring_bytes(kind: str, group: int, result_bytes: float) -> float:
    """Returns the bytes that each device sends in a collective of `group` devices by the ring algorithm.

    Args:
      kind: one of COLLECTIVES.
      group: devices in the ring; 1 sends nothing.
      result_bytes: size of the result on each device.
    """
    share = (group - 1) / group
    if kind == "all-reduce":  # reduce-scatter, then all-gather
        return 2 * share * result_bytes
    if kind == "reduce-scatter":  # the result is one of `group` shards
        return (group - 1) * result_bytes
    if kind in ("collective-permute", "collective-broadcast"):
        return result_bytes if group > 1 else 0.0
    return share * result_bytes


def read(text: str, num_devices: int) -> Program:
    """Reads the cost of a compiled module for `num_devices` devices. Raises ValueError: not HLO text."""
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
        self.chains = set(chains)  # collectives seen that are spread over several fusions, by name and times

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
                self.most_expensive(each.branches, times)
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

    def most_expensive(self, branches: Sequence[str], times: int) -> None:
        """Adds the branch with the most cycles; without cycles, the one with the most products or traffic."""
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
        """Cycles, passes of products, and bytes moved or sent."""
        return (
            sum(each.cycles * each.times for each in self.operations),
            sum(each.passes * each.times for each in self.operations),
            sum(each.bytes * each.times for each in self.operations) + sum(each.total for each in self.collectives),
        )

    def inside(self, each: Instruction, computation: Computation, times: int) -> float:
        """Adds the products and collectives of an instruction and its callees; returns their FLOPs."""
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # An overlapped collective on TPU appears, with one channel, in every fusion that it overlaps with.
            chain = re.search(r'chain_id="(\d+)"', each.attributes)
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            if chain and channel:
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
            if "all-reduce-scatter" in called:  # the TPU compiler's reduce-scatter: an all-reduce, then a slice
                self.collectives[first:] = [
                    dataclasses.replace(one, kind="reduce-scatter", bytes=one.bytes / 2, source=each.source)
                    for one in self.collectives[first:]
                ]
            return flops
        return 0.0

    def stored_dtype(self, name: str, computation: Computation) -> str:
        """Dtype of an operand; of its source, if it is only widened on the way to the matrix unit."""
        each = computation[name]
        if each.opcode == "convert" and each.operands[0] in computation:
            source = computation[each.operands[0]].arrays[0]
            return min(source, each.arrays[0], key=lambda array: itemsize(array.dtype)).dtype
        return each.arrays[0].dtype

    def collective(self, kind: str, each: Instruction, computation: Computation, times: int) -> Collective:
        arrays = each.arrays
        if each.opcode.endswith("-start") and kind != "all-reduce":
            # (operands, results, ...), with as many results as operands.
            operands = len(each.operands)
            arrays = arrays[operands : 2 * operands]
        group = _group_size(each.attributes, self.num_devices)
        total = sum(array.bytes for array in arrays)
        overlapped = each.opcode.endswith("-start") or "chain_id=" in each.attributes
        return Collective(kind, arrays[0].dtype, group, ring_bytes(kind, group, total), times, each.source, overlapped)

    def trips(self, loop: Instruction, outer: Computation) -> int:
        """Returns the iterations of a while: the compiler's annotation, or from its counter's start, limit and step.

        A loop that does not count between constants is added to `unread` and counts once.
        """
        annotated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if annotated:
            return int(annotated[1])
        condition, body = (self.computations[loop.called(name) or ""] for name in ("condition", "body"))
        compared = [condition[name] for name in condition.root.operands if name in condition]
        limit = next((value for one in compared if (value := _integer(one)) is not None), None)
        position = next((_index(one) for one in compared if one.opcode == "get-tuple-element"), -1)
        start = _integer(self.element(outer, loop.operands[0], position))
        after = self.element(body, body.root.name, position)
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

    def element(self, computation: Computation, name: str, position: int) -> Instruction | None:
        """Returns the source of a tuple's element, before any copies; None if it is unknown."""
        made = computation.get(name)
        if made is None or made.opcode != "tuple" or not 0 <= position < len(made.operands):
            return None
        found = computation.get(made.operands[position])
        while found is not None and found.opcode in ("copy", "bitcast", "convert"):
            found = computation.get(found.operands[0])
        return found

    def traffic(self, each: Instruction, computation: Computation) -> float:
        """Bytes that an instruction reads from HBM and writes to it."""
        if each.opcode.removesuffix("-start") in COLLECTIVES:
            return 0.0
        if each.opcode == "async-start" and (called := each.called("calls")):
            return self.wrapped_traffic(self.computations[called])
        if each.opcode.endswith("-start"):  # a copy between HBM and on-chip memory, or within HBM
            ends = each.arrays[:2]
            moved = min((array.bytes for array in ends), default=0.0)
            return moved * sum(not array.on_chip for array in ends)
        if each.opcode == "fusion" and (called := each.called("calls")):
            return self.fusion_traffic(each, self.computations[called], computation)
        read = {name: computation[name].arrays for name in each.operands if name in computation}
        if each.opcode in ("dynamic-slice", "slice", "gather"):
            return _slice_traffic(each.arrays, read.get(each.operands[0], ()))
        if each.opcode == "dynamic-update-slice":
            return _slice_traffic(read.get(each.operands[1], ()), each.arrays)
        return sum(array.bytes for arrays in (*read.values(), each.arrays) for array in arrays if not array.on_chip)

    def wrapped_traffic(self, inner: Computation) -> float:
        """Traffic of the body of an async-start. Gathers of the sparse cores read as much as they write."""
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
                # Only the slices are read; an array updated in place is not read at all.
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


def _slice_traffic(part: Sequence[Array], source: Sequence[Array]) -> float:
    """Bytes of copying a slice out of an array, or into one."""
    return sum(array.bytes * ((not array.on_chip) + (not source[0].on_chip)) for array in part[:1]) if source else 0.0


def _integer(each: Instruction | None) -> int | None:
    """Value of an integer constant; None for others."""
    if each is None or each.opcode != "constant" or each.arrays[0].dtype not in ("s32", "u32", "s64", "u64"):
        return None
    return int(each.attributes) if each.attributes.isdigit() else None


def _target(each: Instruction) -> str:
    """Target of a custom-call; "" for others."""
    found = re.search(r'custom_call_target="([^"]*)"', each.attributes) if each.opcode == "custom-call" else None
    return found[1] if found else ""


def _index(each: Instruction) -> int:
    """Index of a get-tuple-element."""
    found = re.search(r"\bindex=(\d+)", each.attributes)
    return int(found[1]) if found else 0


def _group_size(attributes: str, num_devices: int) -> int:
    """Devices per group of a collective."""
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
    """Twice the multiplications of a dot or convolution, without those by zeros from padding or dilation."""
    if each.opcode == "dot":
        contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
        axes = [int(axis) for axis in contracting[1].split(",") if axis] if contracting else []
        return 2.0 * each.arrays[0].size * math.prod(left.shape[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        return 0.0
    image, kernel, out = labels.groups()
    result = each.arrays[0].shape
    spatial = sorted(label for label in image if label.isdigit())  # in the order of the window's numbers
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
    """Pairs of output and window position with an input value, along one axis."""
    last = (length - 1) * dilate
    count = 0
    for out in range(outputs):
        for tap in range(size):
            at = out * stride + tap * spread - low
            count += 0 <= at <= last and at % dilate == 0
    return count
