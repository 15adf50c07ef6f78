"""The device mesh and the one table from logical axis names to mesh axes.

Parameters and activations name their axes in the models; nothing else knows the mesh.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from marjax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Batches are cut over data and fsdp; parameters over fsdp along "embed", and those of Transformer blocks over tensor
# between heads and hidden features.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("tokens", "tensor"),  # of the diffusion head's loss
    ("kv", None),
    ("layers", None),
)

# Elements of a tensor (of one layer, where layers are stacked) below which it stays whole on every device. To gather
# 64Ki float32 values takes a TPU's links a few microseconds, no more than it takes to start; all biases, norms and the
# like of mar_huge together are under 1 % of its parameters, so that cutting them would save next to nothing.
REPLICATE_BELOW = 2**16


class Parameter(jax.ShapeDtypeStruct):
    """A parameter's shape, dtype and sharding, with the logical names of its axes (none: it has no names).

    `undivided` are mesh axes that the rules would cut it along, but whose size does not divide the axis in question.
    """

    __slots__ = ["names", "undivided"]

    def __init__(
        self, leaf: Any, names: tuple[str | None, ...], sharding: NamedSharding, undivided: tuple[str, ...] = ()
    ) -> None:
        super().__init__(leaf.shape, leaf.dtype, sharding=sharding)
        self.names, self.undivided = names, undivided


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh over all devices, or those given; one axis may be -1 and takes what the others leave.

    Where `fsdp` is -1, so may be `data`, as it is by default: it then is 1. Devices along "tensor" are
    of one process: what tensor parallelism sends in every layer must stay within a host.

    Raises:
      UserError: the axes do not multiply to the number of devices, or `tensor` does not divide those of a process.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [1 if data == fsdp == -1 else data, fsdp, tensor]
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {dict(zip(AXES, sizes, strict=True))}: give sizes of at least 1, at most one of them -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // -int(np.prod(sizes)))
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {int(np.prod(sizes))} devices, but there "
            f"are {len(devices)}: change config.mesh (-1 takes what is left)"
        )
    types = (AxisType.Auto,) * 3
    try:
        mesh = jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis is no product of a slice's sides, such as 16 of the 8 x 8 chips of a v6e-64
        mesh = Mesh(
            mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True), AXES, axis_types=types
        )
    if not _spans_processes(mesh.devices):
        return mesh
    return Mesh(_within_processes(devices, tuple(sizes)), AXES, axis_types=(AxisType.Auto,) * 3)


def _spans_processes(grid: np.ndarray) -> bool:
    """Whether devices along the last axis of a grid belong to several processes."""
    return any(len({device.process_index for device in group}) > 1 for group in grid.reshape(-1, grid.shape[-1]))


def _within_processes(devices: list[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices in a grid of that shape, those along its last axis of one process. Raises UserError."""
    by_process: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        by_process.setdefault(device.process_index, []).append(device)
    for process, own in by_process.items():
        if len(own) % sizes[-1]:
            raise UserError(
                f"config.mesh.tensor is {sizes[-1]}, but process {process} has {len(own)} devices, and a "
                f"tensor group must not span hosts: give a divisor of {len(own)}, and the rest to "
                f"config.mesh.fsdp or data"
            )
    ordered = np.empty(len(devices), object)
    ordered[:] = [device for own in by_process.values() for device in own]
    return ordered.reshape(sizes)


def near_mesh(fsdp: int, tensor: int, devices: Any = None) -> Mesh:
    """A mesh over `devices`, by default all, whose axes are as close to these sizes as the number of devices allows.

    Use it where results do not depend on the mesh: a model trained on a pod is sampled on any machine.
    """
    devices = list(jax.devices() if devices is None else devices)
    per_host = min(Counter(device.process_index for device in devices).values())
    tensor = math.gcd(tensor if tensor > 0 else 1, per_host)
    fsdp = math.gcd(fsdp, len(devices) // tensor) if fsdp > 0 else len(devices) // tensor
    return make_mesh(-1, fsdp, tensor, devices)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh cuts a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_on_a_device(rows: int) -> int:
    """How many of a batch's rows each device holds, under the mesh that `jax.set_mesh` has set, if any."""
    return -(-rows // _shards_set())


def _shards_set() -> int:
    """`batch_shards` of the mesh that `jax.set_mesh` has set, 1 without any."""
    shape = jax.sharding.get_abstract_mesh().shape
    return shape.get("data", 1) * shape.get("fsdp", 1)


def map_rows(function: Callable[[jax.Array], jax.Array], rows: jax.Array, at_once: int) -> jax.Array:
    """`function` of an array whose rows do not depend on each other, so many rows a device at a time.

    Every device goes through its own rows, those of the mesh that `jax.set_mesh` has set, if any. The number at a time
    is the largest divisor of a device's rows that is not above `at_once`, so no row is computed twice.

    Args:
      function: (B', ...) -> (B', ...), for any B'.
      rows: (B, ...), cut over data and fsdp along B.
      at_once: at least 1.
    """
    total, shards = rows.shape[0], _shards_set()
    shards = shards if total % shards == 0 else 1  # else it is not cut
    here = total // shards
    parts = next(parts for parts in range(1, here + 1) if here % parts == 0 and here // parts <= at_once)
    if parts == 1:
        return function(rows)
    # Every parts-th row goes to a part, so that each device keeps its own rows.
    cut = jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)
    if shards > 1:
        cut = jax.lax.with_sharding_constraint(cut, PartitionSpec(None, ("data", "fsdp")))
    done = jnp.swapaxes(jax.lax.map(function, cut), 0, 1)
    return done.reshape(total, *done.shape[2:])


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Raises UserError unless every microbatch can be cut over the mesh."""
    if batch_size % (batch_shards(mesh) * accumulate):
        raise UserError(
            f"config.train.batch_size {batch_size} is not divisible by train.accumulate {accumulate} times "
            f"the {batch_shards(mesh)} batch shards of mesh {dict(mesh.shape)}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over data and fsdp, the others whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def parameters(boxed: Any, mesh: Mesh, replicate_below: int = REPLICATE_BELOW) -> Any:
    """A tree of Parameter from an abstract one that still carries its logical names.

    A tensor of fewer than `replicate_below` elements, not counting stacked layers, stays whole, and so does an axis
    that its mesh axis does not divide.
    """
    rules = dict(RULES)

    def one(leaf: Any) -> Parameter:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return Parameter(leaf, (None,) * len(leaf.shape), replicated(mesh))
        shape, names = leaf.value.shape, leaf.names
        if math.prod(size for size, name in zip(shape, names, strict=True) if name != "layers") < replicate_below:
            return Parameter(leaf.value, names, replicated(mesh))
        wanted: list[Any] = [rules[name] if name else None for name in names]
        undivided = tuple(axis for axis, size in zip(wanted, shape, strict=True) if axis and size % mesh.shape[axis])
        spec = [axis if axis not in undivided else None for axis in wanted]
        return Parameter(leaf.value, names, NamedSharding(mesh, PartitionSpec(*spec)), undivided)

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def parameter_shardings(boxed: Any, mesh: Mesh, replicate_below: int = REPLICATE_BELOW) -> Any:
    """The sharding of every parameter of an abstract tree that still carries its logical names; see `parameters`."""
    return jax.tree.map(lambda leaf: leaf.sharding, parameters(boxed, mesh, replicate_below))


def overview(params: Any) -> str:
    """A table of how parameters lie on the mesh, for people.

    A line a tensor that is cut, with its logical axes and the mesh axes they are cut over; one line for all that are
    whole on every device. "state" is what a device holds of the tensor, its EMA and Adam's two moments, all float32.
    Further lines warn of mesh axes that cut less than the rules would have them.

    Args:
      params: a tree of Parameter, as `models.init.abstract_params` gives it.
    """
    leaves = _named(params)
    mesh = leaves[0][1].sharding.mesh
    rows: list[tuple[str, ...]] = [("parameters", "shape", "axes", "total", "state a device")]
    whole, total, state = [], 0, 0
    for path, leaf in leaves:
        size, here = _bytes(leaf.shape, leaf), 4 * _bytes(leaf.sharding.shard_shape(leaf.shape), leaf)
        total, state = total + size, state + here
        if leaf.sharding.is_fully_replicated:
            whole.append(leaf)
            continue
        axes = [
            f"{name or '-'}{f'>{axis}' if axis and mesh.shape[axis] > 1 else ''}"
            for name, axis in zip(leaf.names, leaf.sharding.spec, strict=True)
        ]
        rows.append((path, " x ".join(map(str, leaf.shape)), " ".join(axes), _mib(size), _mib(here)))
    size = sum(_bytes(leaf.shape, leaf) for leaf in whole)
    if whole:
        rows.append((f"{len(whole)} tensors, whole on every device", "", "", _mib(size), _mib(4 * size)))
    rows.append((f"all {len(leaves)}", "", "", _mib(total), _mib(state)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *warnings(params)])


def warnings(params: Any) -> list[str]:
    """A sentence for every mesh axis that does not divide what it should cut, from a tree of Parameter."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for path, leaf in _named(params):
        for axis in leaf.undivided:
            found.setdefault(axis, []).append((path, leaf))
    lines = []
    for axis, leaves in found.items():
        path, leaf = max(leaves, key=lambda item: math.prod(item[1].shape))
        size = leaf.sharding.mesh.shape[axis]
        name, length = next(
            (name, length)
            for name, length in zip(leaf.names, leaf.shape, strict=True)
            if dict(RULES).get(name or "") == axis and length % size
        )
        share = sum(_bytes(leaf.shape, leaf) for _, leaf in leaves)
        lines.append(
            f"warning: mesh axis {axis}={size} cannot cut {len(leaves)} tensors of {_mib(share)}, among them "
            f"{path}, whose {length} {name} it does not divide: they stay whole along it"
        )
    return lines


def _named(params: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, as "backbone/encoder/..."."""
    return [
        ("/".join(str(entry.key) for entry in path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ]


def _bytes(shape: tuple[int, ...], leaf: Any) -> int:
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"


def logical_rules(mesh: Mesh) -> Any:
    """The context in which the models' activation constraints mean something; enter it while tracing."""
    del mesh
    return nn.logical_axis_rules(RULES)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has, such as frozen weights, as arrays with a copy on every device.

    Those that are only described, as ShapeDtypeStruct, stay so, with that sharding.
    """
    sharding = replicated(mesh)

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf)[index])

    return jax.tree.map(one, tree)


def rows_held(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, ascending: int64.

    They need not follow on each other. A host of a slice has a block of neighbouring chips, and the mesh goes through
    the slice as its links do: of 16 chips of v5e, the first host has 0, 1, 6 and 15.
    """
    shards = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts = sorted({rows[0].start or 0 for rows in shards if rows is not None})
    return (np.array(starts, np.int64)[:, None] + np.arange(batch_size // batch_shards(mesh))).ravel()


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a global batch, those of `rows_held`, numpy, as arrays cut over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A global batch that every process has as a whole, numpy, as arrays cut over the mesh."""
    return put_batch(jax.tree.map(lambda whole: whole[rows_held(mesh, len(whole))], batch), mesh)
