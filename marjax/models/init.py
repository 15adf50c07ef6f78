"""Initialises a generator's parameters, or describes their shapes and shardings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from marjax import numerics, sharding
from marjax.models.generator import Generator
from marjax.trees import PyTree


def init_params(generator: Generator, key: jax.Array) -> PyTree:
    """Random float32 parameters, boxed with their logical axis names."""
    tokens = jnp.zeros((1, generator.num_tokens, generator.token_dim))
    rand = generator.draw_loss_randomness(key, 1)
    if generator.num_codes:
        generator = generator.with_codebook(jnp.zeros((generator.num_codes, generator.token_dim)))
    return generator.init({"params": key}, tokens, jnp.zeros((1,), jnp.int32), rand, deterministic=True)["params"]


def init_unboxed(generator: Generator, key: jax.Array) -> PyTree:
    """Random parameters as plain float32 arrays."""
    return nn.unbox(init_params(generator, key))


def abstract_params(generator: Generator, mesh: Mesh, replicate_below: int = sharding.REPLICATE_BELOW) -> PyTree:
    """The parameters as ShapeDtypeStructs with shardings (`sharding.Parameter`).

    `replicate_below` is `config.mesh.replicate_below`.
    """
    boxed = jax.eval_shape(lambda: init_params(generator, numerics.key(0)))
    return sharding.parameters(boxed, mesh, replicate_below)
