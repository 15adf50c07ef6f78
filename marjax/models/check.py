"""Checks registered backbones and heads against their contracts."""

from typing import Any

import jax
import jax.numpy as jnp

from marjax import numerics
from marjax.errors import UserError
from marjax.model_config import ModelConfig
from marjax.models.generator import Classes, Generator
from marjax.trees import PyTree


def check(generator: Generator, model: ModelConfig) -> None:
    """Traces a generator with a registered head or backbone, to find its errors before a run starts.

    Raises:
      UserError: a result violates the protocols. Errors raised by registered code propagate.
    """
    batch, length, dim = 2, generator.num_tokens, generator.token_dim
    head, variant = f"config.model.head={model.head}", f"config.model.variant={model.variant}"

    def trace(key: jax.Array) -> PyTree:
        tokens, labels = jnp.zeros((batch, length, dim)), jnp.zeros((batch,), jnp.int32)
        network = generator.with_codebook(jnp.zeros((generator.num_codes, dim)) if generator.num_codes else None)
        rand = network.draw_loss_randomness(key, batch)
        terms, variables = network.init_with_output({"params": key, "dropout": key}, tokens, labels, rand)
        noise = jax.vmap(lambda key: network.head.draw_sample_noise(key, length, "4"))(jax.random.split(key, batch))

        def backbone_output(module: Generator) -> jax.Array:
            return module.backbone_output(tokens, Classes(labels, rand.drop_label), rand.order, rand.num_known)

        def sample(module: Generator, z: jax.Array) -> jax.Array:
            return module.head.sample(
                jnp.concatenate([z, z]), noise, jnp.float32(2.0), num_sampling_steps="4", temperature=jnp.float32(1.0)
            )

        z = network.apply(variables, method=backbone_output)
        return rand.num_known, z, terms, network.apply(variables, z, method=sample), variables

    num_known, z, terms, tokens, variables = jax.eval_shape(trace, numerics.key(0))
    _expect(f"{variant}: draw_num_known", num_known, (batch,), jnp.int32)
    _expect(f"{variant}: __call__", z, (batch, length, generator.width))
    if not isinstance(terms, dict) or not all(isinstance(term, tuple) and len(term) == 2 for term in terms.values()):
        raise UserError(f"{head}: __call__ returns {type(terms).__name__}, expected a dict of name: (values, weights)")
    if "loss" not in terms:
        raise UserError(f"{head}: __call__ returns the terms {', '.join(terms) or 'none'}, expected one named 'loss'")
    for name, (values, weights) in terms.items():
        try:
            shape = jnp.broadcast_shapes(values.shape, weights.shape)
        except ValueError:
            shape = ()
        if not shape or shape[0] != batch or values.dtype != jnp.float32:
            raise UserError(
                f"{head}: the term {name!r} has values {_shown(values)} and weights {_shown(weights)}, "
                f"expected float32 values broadcastable with the weights, such as ({batch}, {length}), one per token"
            )
    _expect(f"{head}: sample", tokens, (batch, length, dim), jnp.float32)
    if set(variables) != {"params"}:
        raise UserError(
            f"{head}, {variant}: the network has Flax collections {', '.join(sorted(variables))}, expected only params"
        )


def _expect(where: str, found: Any, shape: tuple[int, ...], dtype: Any = None) -> None:
    if getattr(found, "shape", None) != shape or (dtype is not None and found.dtype != dtype):
        kind = f"{jnp.dtype(dtype).name} " if dtype is not None else ""
        raise UserError(f"{where} returns {_shown(found)}, expected {kind}{shape}")


def _shown(found: Any) -> str:
    return f"{found.dtype} {found.shape}" if hasattr(found, "shape") else type(found).__name__
