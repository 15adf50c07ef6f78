"""The contract of a backbone: the methods that `models/generator.py` calls.

Shapes: B batch, L tokens, M tokens predicted in one step, D token dimension, W backbone width.
"""

from typing import Protocol, Self

import jax

from marjax.model_config import ModelConfig
from marjax.trees import PyTree


class Backbone(Protocol):
    """Computes z, the backbone output, for every position from the known tokens and the class embedding.

    `marjax.register` makes a custom class a choice of `config.model.variant`. Optional attributes: `order`, "random"
    (default) or "raster"; `many = True` if a step may predict several tokens; `any_next = True` if the next token may
    be any unknown one; the methods `train_flops()`, `step_flops(num_known)`, `padded_step_flops(known_slots)` and
    `unknown_in_training()`, FLOPs per image and the mean number of tokens in the loss, which otherwise count as 0.
    """

    @classmethod
    def from_config(cls, model: ModelConfig, num_tokens: int, token_dim: int) -> Self:
        """Builds the backbone from a resolved `config.model`; see `Head.from_config` for `model.extra`."""
        ...

    def draw_num_known(self, key: jax.Array, batch: int) -> jax.Array:
        """Draws the number of known tokens per image in training, which are not in the loss: int32 (B,)."""
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
        """Computes z for every position, (B, L, W). z must not depend on tokens that are unknown at its position.

        Args:
          tokens_BxLxD: float32, in raster order; values of unknown tokens are arbitrary.
          order_BxL: int, positions in the order of generation.
          num_known_B: int, number of leading entries of `order` that are known, at most `slots`.
          class_embed_BxW: float.
          slots: static upper bound of `num_known`; by default the maximum in training.
          deterministic: disables dropout, which otherwise needs the rng "dropout".
        """
        ...

    def init_cache(self, batch: int) -> PyTree:
        """The initial state carried between steps, such as a KV cache: a pytree, () for none."""
        ...

    def step(
        self,
        cache: PyTree,
        tokens_BxLxD: jax.Array,
        order_BxL: jax.Array,
        start: jax.Array,
        position_BxM: jax.Array,
        class_embed_BxW: jax.Array,
        *,
        known_slots: int,
    ) -> tuple[jax.Array, PyTree]:
        """Computes z for the tokens of one generation step, (B, M, W), and the next cache.

        Args:
          cache: from `init_cache` or the previous step.
          tokens_BxLxD: float32, in raster order; values of unknown tokens are arbitrary.
          order_BxL: int, positions in the order of generation.
          start: int scalar, the number of known tokens, at most `known_slots`.
          position_BxM: int, the positions to predict.
          class_embed_BxW: float.
          known_slots: static upper bound of `start`.
        """
        ...
