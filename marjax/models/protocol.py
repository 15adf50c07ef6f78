"""The contract of a backbone, and the check of registered backbones and heads.

Shapes: B batch, L tokens, M tokens predicted in one step, D token dimension, W backbone width.
"""

from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

from marjax import numerics
from marjax.errors import UserError
from marjax.model_config import ModelConfig


class Backbone(Protocol):
    """z of every position, given the tokens known so far and the class embedding.

    A class of your own becomes a choice of `config.model.variant` by `marjax.register`. Optional attributes: `order`,
    "random" (default) or "raster"; `many = True` if a step may predict several tokens; `any_next = True` if any token
    may come next; the methods `train_flops()`, `step_flops(num_known)`, `padded_step_flops(known_slots)` and
    `unknown_in_training()`, FLOPs per image and the expected number of unknown tokens, which otherwise count as 0.
    """

    @classmethod
    def from_config(cls, model: ModelConfig, num_tokens: int, token_dim: int) -> Self:
        """Builds the backbone from a resolved `config.model`; see `Head.from_config` about `model.extra`."""
        ...

    def draw_num_known(self, key: jax.Array, batch: int) -> jax.Array:
        """How many tokens of each image are shown, and so left out of the loss: int32 (B,)."""
        ...

    def __call__(
        self,
        tokens_BxLxD: jax.Array,
        order_BxL: jax.Array,
        num_known_B: jax.Array,
        class_embed_BxW: jax.Array,
        *,
        slots: int | None = None,
        deterministic: bool,
    ) -> jax.Array:
        """z of every position, (B, L, W); see `models/encoder_decoder.py` for the arguments.

        z of a position must not depend on tokens that are unknown there.
        """
        ...

    def init_cache(self, batch: int) -> Any:
        """What `step` keeps from step to step, a pytree; () for nothing."""
        ...

    def step(
        self,
        cache: Any,
        tokens_BxLxD: jax.Array,
        order_BxL: jax.Array,
        start: jax.Array,
        position_BxM: jax.Array,
        class_embed_BxW: jax.Array,
        *,
        known_slots: int,
    ) -> tuple[jax.Array, Any]:
        """z of the positions of one generation step, (B, M, W), and the cache; see `models/encoder_decoder.py`."""
        ...


def check(generator: Any, model: ModelConfig) -> None:
    """Traces a generator with a registered head or backbone, so that errors in it are found before a run starts.

    Args:
      generator: a `models.generator.Generator`.
      model: its resolved `config.model`.

    Raises:
      UserError: its results violate the protocols. Errors of its own code propagate.
    """
    batch, length, dim = 2, generator.num_tokens, generator.token_dim
    head, variant = f"config.model.head={model.head}", f"config.model.variant={model.variant}"

    def trace(key: jax.Array) -> Any:
        tokens, labels = jnp.zeros((batch, length, dim)), jnp.zeros((batch,), jnp.int32)
        network = generator.with_codebook(jnp.zeros((generator.num_codes, dim)) if generator.num_codes else None)
        rand = network.draw_loss_randomness(key, batch)
        terms, variables = network.init_with_output({"params": key, "dropout": key}, tokens, labels, rand)
        noise = jax.vmap(lambda key: network.head.draw_sample_noise(key, length, "4"))(jax.random.split(key, batch))

        def backbone_output(module: Any) -> jax.Array:
            return module.backbone_output(tokens, labels, rand.drop_label, rand.order, rand.num_known)

        def sample(module: Any, z: jax.Array) -> jax.Array:
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
        raise UserError(f"{head}: __call__ returns the terms {', '.join(terms) or 'none'}, expected one called 'loss'")
    for name, (values, weights) in terms.items():
        try:
            shape = jnp.broadcast_shapes(values.shape, weights.shape)
        except ValueError:
            shape = ()
        if not shape or shape[0] != batch or values.dtype != jnp.float32:
            raise UserError(
                f"{head}: the term {name!r} has values {_shown(values)} and weights {_shown(weights)}, "
                f"expected float32 values of one shape, such as ({batch}, {length}), which is one a token"
            )
    _expect(f"{head}: sample", tokens, (batch, length, dim), jnp.float32)
    if set(variables) != {"params"}:
        raise UserError(
            f"{head}, {variant}: the network has the Flax collections {', '.join(sorted(variables))}, "
            f"expected params alone"
        )


def _expect(where: str, found: Any, shape: tuple[int, ...], dtype: Any = None) -> None:
    if getattr(found, "shape", None) != shape or (dtype is not None and found.dtype != dtype):
        kind = f"{jnp.dtype(dtype).name} " if dtype is not None else ""
        raise UserError(f"{where} returns {_shown(found)}, expected {kind}{shape}")


def _shown(found: Any) -> str:
    return f"{found.dtype} {found.shape}" if hasattr(found, "shape") else type(found).__name__
