"""The contract of a backbone: the methods that `models/generator.py` calls.

Shapes: B batch, L tokens, M tokens predicted in one step, D token dimension, W backbone width.
"""

from typing import Protocol, Self

import jax

from marjax.model_config import ModelConfig
from marjax.trees import PyTree


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

    def init_cache(self, batch: int) -> PyTree:
        """What `step` keeps from step to step, a pytree; () for nothing."""
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
        """z of the positions of one generation step, (B, M, W), and the cache; see `models/encoder_decoder.py`."""
        ...
