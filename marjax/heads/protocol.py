"""The contract of a head: the methods that `models/generator.py` calls.

Shapes: B batch, L tokens, M tokens predicted in one step, D token dimension, W backbone width, V codebook size.
"""

from typing import Protocol, Self

import jax

from marjax.model_config import ModelConfig
from marjax.trees import PyTree

Terms = dict[str, tuple[jax.Array, jax.Array]]


class Head(Protocol):
    """The distribution of one token given its z, as a Flax module.

    `marjax.register` makes a custom class a choice of `config.model.head`. Methods called outside of `apply` must be
    decorated with `flax.linen.nowrap` and use fields only, no parameters.

    Optional fields: `codebook`, set to the tokenizer's codebook, float32 (V, D), before the head is applied;
    `batch_shards`, set to the number of devices that a batch is sharded over when sampling. Optional attributes:
    `discrete = True` if the head models codes; `schedule = "cosine"`, its default learning rate schedule; a method
    `sample_ranked` (see `heads/categorical.py`) for orders by confidence; `loss_flops()` and
    `sample_flops(num_sampling_steps)`, FLOPs per token, which otherwise count as 0 in the reported MFU.
    """

    @classmethod
    def from_config(cls, model: ModelConfig, token_dim: int, num_codes: int) -> Self:
        """Builds the head from a resolved `config.model`.

        `model.extra` holds custom settings as text, parsed by `marjax.config.parse_arg(model.extra, rate=0.1)`.
        `num_codes` is the codebook size, 0 for continuous tokens. Raises UserError for invalid settings.
        """
        ...

    def draw_loss_noise(self, key: jax.Array, batch: int, num_tokens: int) -> PyTree:
        """The randomness of the loss, a pytree whose leaves have the batch axis first; () for none."""
        ...

    def __call__(self, z_BxLxW: jax.Array, tokens_BxLxD: jax.Array, noise: PyTree, weight_BxL: jax.Array) -> Terms:
        """Per-token terms, name -> (values, weights): the weighted mean of "loss" is minimised, all are logged.

        Args:
          z_BxLxW: in the compute dtype.
          tokens_BxLxD: float32.
          noise: from `draw_loss_noise`.
          weight_BxL: float32, 1 where the token counts, else 0.

        Returns:
          float32 arrays, broadcastable to each other, with the batch axis first.
        """
        ...

    def draw_sample_noise(self, key: jax.Array, num_tokens: int, num_sampling_steps: str) -> PyTree:
        """The randomness of sampling one image, a pytree whose leaves have the token axis first; () for none."""
        ...

    def sample(
        self,
        z: jax.Array,
        noise: PyTree,
        cfg_scale: jax.Array | None,
        *,
        num_sampling_steps: str,
        temperature: float | jax.Array,
    ) -> jax.Array:
        """Tokens, float32 (B, M, D).

        Args:
          z: (B, M, W), or with cfg (2 B, M, W), conditional half first.
          noise: from `draw_sample_noise`, leading axes (B, M).
          cfg_scale: scalar, or None for no cfg.
          num_sampling_steps: as in `config.sample`, static.
          temperature: as in `config.sample`.
        """
        ...
