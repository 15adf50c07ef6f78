"""The training state, its shapes and its shardings."""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh, Sharding

from marjax import numerics, sharding
from marjax.models.generator import Generator
from marjax.models.init import init_unboxed
from marjax.trees import PyTree


@flax.struct.dataclass
class TrainState:
    """`step` int32 () counts finished steps; `params` and `ema` are float32 trees of the same structure."""

    step: jax.Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree


def abstract_state(params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs; optimizer state and EMA have the shardings of `params`."""
    replicated = sharding.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, param: _struct(leaf, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: _struct(leaf, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(step=step, params=params, ema=params, opt_state=opt_state)  # type: ignore[arg-type]


def create(
    generator: Generator,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
    given: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """Creates the state at step 0, sharded as `abstract`; the EMA is initialised to the parameters.

    `given` maps paths ("backbone/mask_token") to arrays, sharded as in `abstract`, that replace random parameters.
    """

    def init(key: jax.Array, given: dict[str, jax.Array]) -> TrainState:
        flat = traverse_util.flatten_dict(init_unboxed(generator, key), sep="/")
        params = traverse_util.unflatten_dict(flat | given, sep="/")
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # It runs once and has one kernel per parameter: on CPU, optimising them dominates.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    created = jax.jit(init, out_shardings=shardings, compiler_options=options)
    state: TrainState = created(numerics.key(seed), dict(given or {}))
    return state


def _struct(leaf: jax.Array, where: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
