"""Content checksums of array trees, computed on the devices.

Every element's bits are mixed with a hash of the element's linear index, and the results are summed modulo 2**32. The
mixing is a bijection of the bits for each index, so one changed element always changes the sum; the sum does not depend
on the order of its terms, so the value is the same for every sharding, mesh and number of processes.
"""

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from marjax.trees import PyTree

# Two independent sums, with different seeds of the index hash.
_SEEDS = (0x9E3779B9, 0x7F4A7C15)

_SMALL = 2**16  # elements


# lax operations, since those of jnp are jitted functions, which would double the time of tracing.
def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit reaches every output bit (the finalizer of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = lax.bitwise_xor(h, lax.shift_right_logical(h, np.uint32(shift)))
        h = lax.mul(h, np.uint32(factor))
    return lax.bitwise_xor(h, lax.shift_right_logical(h, np.uint32(16)))


def _words(x: jax.Array) -> list[jax.Array]:
    """The bits of x as uint32 arrays of its shape: several if elements have more than 32 bits."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(x.real) + _words(x.imag)
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
    if bits == 64:
        pairs = lax.bitcast_convert_type(x, jnp.uint32)
        return [pairs[..., 0], pairs[..., 1]]
    return [lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)]


@jax.jit  # so that large arrays of one shape are traced once
def _sums(x: jax.Array) -> jax.Array:
    """The two sums of one array, (2,) uint32, in one pass: the seeds are a leading axis of the one reduction."""
    # Indices wrap after 2**32 words: swapping two elements that far apart would go unnoticed.
    words = _words(x)
    index, stride = lax.full(x.shape, np.uint32(0)), len(words)
    for axis in reversed(range(x.ndim)):
        index = lax.add(index, lax.mul(lax.broadcasted_iota(jnp.uint32, x.shape, axis), np.uint32(stride % 2**32)))
        stride *= x.shape[axis]
    seeds = np.array(_SEEDS, np.uint32)
    total = lax.full((2, *x.shape), np.uint32(0))
    for k, word in enumerate(words):
        seeded = lax.add(lax.broadcast(index, (2,)), lax.broadcast_in_dim(seeds + np.uint32(k), total.shape, (0,)))
        total = lax.add(total, _mix(lax.bitwise_xor(lax.broadcast(word, (2,)), _mix(seeded))))
    return lax.reduce(total, np.uint32(0), lax.add, tuple(range(1, x.ndim + 1)))


@functools.cache
def _compiled(out_sharding: Sharding | None) -> Any:
    # Small arrays of one shape and dtype are stacked: with one computation per array, deep networks took about as long
    # to compile here as their training step. Large arrays are not, since stacking may copy them.
    def sums(leaves: list[jax.Array]) -> jax.Array:
        kinds: dict[Hashable, list[int]] = {}
        for place, x in enumerate(leaves):
            kinds.setdefault((x.shape, x.dtype) if x.size <= _SMALL else place, []).append(place)
        rows = [jax.vmap(_sums)(jnp.stack([leaves[place] for place in places])) for places in kinds.values()]
        return jnp.concatenate(rows)[np.argsort(np.concatenate(list(kinds.values())))]

    return jax.jit(sums, out_shardings=out_sharding)


def _ids(devices: Any) -> tuple[int, ...]:
    return tuple(device.id for device in devices)


def _placement(x: Any) -> tuple[Hashable, Sharding | None]:
    """A key that is equal for arrays that can enter one computation, and a sharding that replicates its result."""
    if not isinstance(x, jax.Array) or not x.committed:
        return None, None
    if isinstance(x.sharding, NamedSharding) and isinstance(x.sharding.mesh, Mesh):
        mesh = x.sharding.mesh
        return _ids(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())
    if isinstance(x.sharding, SingleDeviceSharding):
        return _ids(x.sharding.device_set), x.sharding
    return tuple(sorted(_ids(x.sharding.device_set))), None


def paths(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their path, {"a/0/b": leaf}, in the order of jax.tree.leaves.

    Raises:
      ValueError: two leaves have the same path, because a key contains a slash.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(named) < len(flat):
        raise ValueError("two leaves of the tree have the same path; keys must not contain a slash")
    return named


def checksum(tree: PyTree) -> dict[str, str]:
    """Checksums every array in a tree without copying the arrays to the host.

    All processes of a run must call it with the same tree.

    Args:
      tree: arrays of any shape, dtype (floats, integers, bool; bit for bit, so -0.0 is not 0.0) and sharding.

    Returns:
      {path: 16 hex digits}, path as in `paths`. Equal content gives equal values whatever the sharding.
    """
    leaves = paths(tree)
    groups: dict[Hashable, list[str]] = {}
    shardings: dict[Hashable, Sharding | None] = {}
    for path, leaf in leaves.items():
        key, sharding = _placement(leaf)
        groups.setdefault(key, []).append(path)
        shardings.setdefault(key, sharding)
    # Uncommitted arrays join another group: a state is on one mesh, so that this is one call.
    if None in groups and len(groups) > 1:
        key = next(k for k in groups if k is not None)
        groups[key] += groups.pop(None)
    pending = [_compiled(shardings[key])([leaves[p] for p in members]) for key, members in groups.items()]
    result: dict[str, str] = {}
    for members, sums in zip(groups.values(), jax.device_get(pending), strict=True):
        result.update({p: f"{int(a):08x}{int(b):08x}" for p, (a, b) in zip(members, sums, strict=True)})
    return {path: result[path] for path in leaves}
