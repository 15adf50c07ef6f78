"""What a backbone and a head are: the methods that `models/generator.py` calls.

Both are Flax modules; a class of your own becomes a choice of the config by `marjax.register`. Methods that are called
outside of `apply` are decorated with `flax.linen.nowrap` and use fields only, no parameters.

Shapes: B batch, L tokens of an image, M tokens of one generation step, D token dimension, W backbone width.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from marjax import numerics
from marjax.errors import UserError

Terms = dict[str, tuple[jax.Array, jax.Array]]


class Head(Protocol):
    """The distribution of one token given its z.

    A class may also have these attributes: `discrete = True` for a head that models codes, `schedule = "cosine"` for
    its default learning rate schedule; a method `sample_ranked` (see `heads/categorical.py`) for orders by
    confidence; and `loss_flops()` and `sample_flops(num_sampling_steps)`, FLOPs of one token, which otherwise count as
    0 in the reported MFU.
    """

    @classmethod
    def from_config(cls, model: Any, token_dim: int, num_codes: int) -> "Head":
        """From a resolved `config.model`.

        `model.extra` has settings of your own as text: `marjax.config.parse_arg(model.extra, rate=0.1)` parses it.
        `num_codes` is the size of the codebook, 0 for continuous tokens. Raises UserError for settings it cannot use.
        """
        ...

    def draw_loss_noise(self, key: jax.Array, batch: int, num_tokens: int) -> Any:
        """The randomness of the loss, a pytree whose leaves have the batch axis first; () for none. Not a parameter."""
        ...

    def __call__(
        self,
        z_BxLxW: jax.Array,
        tokens_BxLxD: jax.Array,
        noise: Any,
        weight_BxL: jax.Array,
        codebook: jax.Array | None = None,
    ) -> Terms:
        """Per-token terms, name -> (values, weights); the weighted mean of "loss" is trained on, all are logged.

        Args:
          z_BxLxW: in the compute dtype.
          tokens_BxLxD: float32.
          noise: from `draw_loss_noise`.
          weight_BxL: float32, 1 where the token counts, else 0.
          codebook: of a discrete tokenizer, float32 (K, D).

        Returns:
          float32 arrays, broadcastable to each other, with the batch axis first.
        """
        ...

    def draw_sample_noise(self, key: jax.Array, num_tokens: int, num_sampling_steps: str) -> Any:
        """The randomness of sampling one image, a pytree whose leaves have the token axis first; () for none."""
        ...

    def sample(
        self,
        z: jax.Array,
        noise: Any,
        guidance: jax.Array | None,
        *,
        num_sampling_steps: str,
        temperature: float | jax.Array,
        codebook: jax.Array | None = None,
    ) -> jax.Array:
        """Tokens, float32 (B, M, D), from z (B, M, W).

        With `guidance`, a scalar, z is (2 B, M, W): the unconditional half follows the conditional one.
        """
        ...


class Backbone(Protocol):
    """z of every position, given the tokens known so far and the class embedding.

    A registered class is chosen as `config.model.variant`. It may have the attributes `order`, "random" (default) or
    "raster"; `many = True` if a generation step may predict several tokens; `any_next = True` if any token may come
    next; and the methods `train_flops()`, `step_flops(num_known)`, `padded_step_flops(known_slots)` and
    `unknown_in_training()`, FLOPs of one image and the expected number of unknown tokens, which otherwise count as 0.
    """

    @classmethod
    def from_config(cls, model: Any, num_tokens: int, token_dim: int) -> "Backbone":
        """From a resolved `config.model`; see `Head.from_config` about `model.extra`."""
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


def check(generator: Any, model: Any) -> None:
    """Traces a network with a registered head or backbone, so that a mistake in it is found before a run begins.

    Args:
      generator: a `models.generator.Generator`.
      model: its resolved `config.model`.

    Raises:
      UserError: its results are not what the protocols above ask for. What its own code raises is raised as it is.
    """
    batch, length, dim = 2, generator.num_tokens, generator.token_dim
    head, variant = f"config.model.head={model.head}", f"config.model.variant={model.variant}"

    def trace(key: jax.Array) -> Any:
        tokens, labels = jnp.zeros((batch, length, dim)), jnp.zeros((batch,), jnp.int32)
        codebook = jnp.zeros((generator.num_codes, dim)) if generator.num_codes else None
        rand = generator.draw_loss_randomness(key, batch)
        terms, variables = generator.init_with_output(
            {"params": key, "dropout": key}, tokens, labels, rand, codebook=codebook
        )
        noise = jax.vmap(lambda key: generator.head.draw_sample_noise(key, length, "4"))(jax.random.split(key, batch))

        def backbone_output(module: Any) -> jax.Array:
            return module.backbone_output(tokens, labels, rand.drop_label, rand.order, rand.num_known)

        def sample(module: Any, z: jax.Array) -> jax.Array:
            return module.head.sample(
                jnp.concatenate([z, z]),
                noise,
                jnp.float32(2.0),
                num_sampling_steps="4",
                temperature=jnp.float32(1.0),
                codebook=codebook,
            )

        z = generator.apply(variables, method=backbone_output)
        return rand.num_known, z, terms, generator.apply(variables, z, method=sample), variables

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
