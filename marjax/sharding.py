"""The device mesh, and the only table from logical axis names to mesh axes.

Models name the axes of parameters and activations; only this module maps them to the mesh.
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

# Shards batches over data and fsdp, parameters over fsdp along "embed", and those of Transformer blocks over tensor
# along heads and hidden features.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("tokens", "tensor"),  # of the diffusion head's loss
    ("kv", None),
    ("layers", None),
)

# Tensors with fewer elements (per layer, if layers are stacked) are replicated. Gathering 64Ki float32 values takes a
# TPU's links a few microseconds, no more than the latency; all biases, norms and the like of mar_huge are under 1 % of
# its parameters, so sharding them would save almost nothing.
REPLICATE_BELOW = 2**16


class Parameter(jax.ShapeDtypeStruct):
    """A parameter's shape, dtype and sharding, with the logical names of its axes (None without a name).

    `undivided` are the mesh axes of RULES whose size does not divide the parameter's axis, which is then replicated.
    """

    __slots__ = ["names", "undivided"]

    def __init__(
        self, leaf: Any, names: tuple[str | None, ...], sharding: NamedSharding, undivided: tuple[str, ...] = ()
    ) -> None:
        super().__init__(leaf.shape, leaf.dtype, sharding=sharding)
        self.names, self.undivided = names, undivided


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh over `devices`, by default all; one axis may be -1, which takes the remaining devices.

    If `fsdp` is -1, `data` may be -1 too and becomes 1. Devices along "tensor" belong to one process, since tensor
    parallelism communicates in every layer and must stay within a host.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `tensor` does not divide those of a process.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [1 if data == fsdp == -1 else data, fsdp, tensor]
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} has invalid sizes; give positive ones, at most one of them -1"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // -int(np.prod(sizes)))
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {int(np.prod(sizes))} devices, found {len(devices)}; "
            f"change config.mesh (-1 takes the remaining devices)"
        )
    types = (AxisType.Auto,) * 3
    try:
        mesh = jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except (
        NotImplementedError
    ):  # an axis size is not a product of the slice's sides, such as 16 on the 8 x 8 chips of a v6e-64
        mesh = Mesh(
            mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True), AXES, axis_types=types
        )
    if not _spans_processes(mesh.devices):
        return mesh
    return Mesh(_within_processes(devices, tuple(sizes)), AXES, axis_types=types)


def _spans_processes(grid: np.ndarray) -> bool:
    """Whether the last axis of a grid of devices spans processes."""
    return any(len({device.process_index for device in group}) > 1 for group in grid.reshape(-1, grid.shape[-1]))


def _within_processes(devices: list[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices as a grid of shape `sizes`, whose last axis stays within a process. Raises UserError."""
    by_process: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        by_process.setdefault(device.process_index, []).append(device)
    for process, own in by_process.items():
        if len(own) % sizes[-1]:
            raise UserError(
                f"config.mesh.tensor={sizes[-1]} does not divide the {len(own)} devices of process {process}, and a "
                f"tensor group must not span hosts; use a divisor, and config.mesh.fsdp or data for the rest"
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
    """The number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _shards_set() -> int:
    """`batch_shards` of the mesh of `jax.set_mesh`; 1 without one."""
    shape = jax.sharding.get_abstract_mesh().shape
    return shape.get("data", 1) * shape.get("fsdp", 1)


def map_rows(function: Callable[[jax.Array], jax.Array], rows: jax.Array, at_once: int) -> jax.Array:
    """Applies `function` to independent rows, at most `at_once` rows per device at a time.

    Each device processes its own rows under the mesh of `jax.set_mesh`, if any. The number at a time is the largest
    divisor of its rows up to `at_once`, so no row is computed twice.

    Args:
      function: (B', ...) -> (B', ...), for any B'.
      rows: (B, ...), sharded over data and fsdp along B.
      at_once: at least 1.
    """
    total, shards = rows.shape[0], _shards_set()
    shards = shards if total % shards == 0 else 1  # else it is replicated
    here = total // shards
    parts = next(parts for parts in range(1, here + 1) if here % parts == 0 and here // parts <= at_once)
    if parts == 1:
        return function(rows)
    # A part takes every parts-th row, so that each device keeps its own rows.
    split = jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)
    if shards > 1:
        split = jax.lax.with_sharding_constraint(split, PartitionSpec(None, ("data", "fsdp")))
    done = jnp.swapaxes(jax.lax.map(function, split), 0, 1)
    return done.reshape(total, *done.shape[2:])


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Raises UserError unless every microbatch can be sharded over the mesh."""
    if batch_size % (batch_shards(mesh) * accumulate):
        raise UserError(
            f"config.train.batch_size={batch_size} is not divisible by config.train.accumulate={accumulate} times the "
            f"{batch_shards(mesh)} batch shards of mesh {dict(mesh.shape)}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis sharded over data and fsdp, the others replicated."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def parameters(boxed: Any, mesh: Mesh, replicate_below: int = REPLICATE_BELOW) -> Any:
    """A tree of Parameter from an abstract tree that carries logical axis names.

    Tensors with fewer than `replicate_below` elements per layer are replicated, as are axes that their mesh axis does
    not divide.
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


def overview(params: Any) -> str:
    """A readable table of how parameters are sharded.

    One line per sharded tensor, with its logical axes and their mesh axes, and one line for all replicated tensors.
    "state" is the part of the tensor, its EMA and Adam's two moments, all float32, that a device holds. The lines of
    `warnings` follow.

    Args:
      params: a tree of Parameter, as `models.init.abstract_params` gives it.
    """
    leaves = _named(params)
    mesh = leaves[0][1].sharding.mesh
    rows: list[tuple[str, ...]] = [("parameters", "shape", "axes", "total", "state per device")]
    replicas, total, state = [], 0, 0
    for path, leaf in leaves:
        size, here = _bytes(leaf.shape, leaf), 4 * _bytes(leaf.sharding.shard_shape(leaf.shape), leaf)
        total, state = total + size, state + here
        if leaf.sharding.is_fully_replicated:
            replicas.append(leaf)
            continue
        axes = [
            f"{name or '-'}{f'>{axis}' if axis and mesh.shape[axis] > 1 else ''}"
            for name, axis in zip(leaf.names, leaf.sharding.spec, strict=True)
        ]
        rows.append((path, " x ".join(map(str, leaf.shape)), " ".join(axes), _mib(size), _mib(here)))
    size = sum(_bytes(leaf.shape, leaf) for leaf in replicas)
    if replicas:
        rows.append((f"{len(replicas)} tensors, replicated", "", "", _mib(size), _mib(4 * size)))
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
    """A line for every mesh axis that does not divide an axis to be sharded, from a tree of Parameter."""
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
            f"warning: mesh axis {axis}={size} does not divide {len(leaves)} tensors of {_mib(share)}, such as {path} "
            f"with {name}={length}: they are replicated along it"
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
    """The context for the sharding constraints of activations in the models; enter it while tracing."""
    return nn.logical_axis_rules(RULES)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Replicates arrays that every process has, such as frozen weights; a ShapeDtypeStruct gets that sharding."""
    sharding = replicated(mesh)

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf)[index])

    return jax.tree.map(one, tree)


def rows_held(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process holds, int64, ascending.

    They need not be contiguous. A host has a block of neighbouring chips, but the mesh follows the slice's links: of 16
    chips of v5e, the first host has 0, 1, 6 and 15.
    """
    shards = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts = sorted({rows[0].start or 0 for rows in shards if rows is not None})
    return (np.array(starts, np.int64)[:, None] + np.arange(batch_size // batch_shards(mesh))).ravel()


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Shards a global batch over the mesh, from numpy arrays of this process's rows (see `rows_held`)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Shards a global batch over the mesh, from numpy arrays of all rows."""
    return put_batch(jax.tree.map(lambda rows: rows[rows_held(mesh, len(rows))], batch), mesh)
