"""The device mesh and the one table from logical axis names to mesh axes.

Parameters and activations name their axes in the models; nothing else knows the mesh.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from marjax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Batches are cut over data and fsdp; parameters over fsdp along "embed" and over tensor between heads and features.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv", None),
    ("layers", None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh over all devices, or those given; one axis may be -1 and takes what the others leave.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {dict(zip(AXES, sizes, strict=True))}: give sizes of at least 1, at most one of them -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // -int(np.prod(sizes)))
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"mesh {dict(zip(AXES, sizes, strict=True))} needs {int(np.prod(sizes))} devices, but there "
                        f"are {len(devices)}: change config.mesh (-1 takes what is left)")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def local_mesh(config: Any) -> Mesh:
    """A mesh over this process's devices alone, as near to `config.mesh` as their number allows."""
    devices = jax.local_devices()
    tensor = math.gcd(config.tensor if config.tensor > 0 else 1, len(devices))
    fsdp = math.gcd(config.fsdp, len(devices) // tensor) if config.fsdp > 0 else len(devices) // tensor
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
        raise UserError(f"config.train.batch_size {batch_size} is not divisible by train.accumulate {accumulate} times "
                        f"the {batch_shards(mesh)} batch shards of mesh {dict(mesh.shape)}")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over data and fsdp, the others whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter of an abstract tree that still carries its logical names.

    An axis that its mesh axis does not divide stays whole.
    """
    rules = dict(RULES)

    def one(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return replicated(mesh)
        spec = [rules[name] if name else None for name in leaf.names]
        spec = [axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, leaf.value.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def logical_rules(mesh: Mesh) -> Any:
    """The context in which the models' activation constraints mean something; enter it while tracing."""
    del mesh
    return nn.logical_axis_rules(RULES)


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has, such as frozen weights, as arrays with a copy on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: np.asarray(leaf)[index]), tree)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a global batch, numpy, as arrays sharded over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
