"""The regression head: a linear layer from z to the token, trained by the squared error (the paper's ablation).

It predicts the conditional mean and nothing else. Shapes: B batch, L tokens, D token dimension, W backbone width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marjax.heads import cfg
from marjax.heads.protocol import Terms
from marjax.model_config import ModelConfig
from marjax.nn.layers import Dense


class RegressionHead(nn.Module):
    """Predicts the mean of a token given z."""

    token_dim: int
    cond_width: int
    dtype: DTypeLike = jnp.float32

    @classmethod
    def from_config(cls, model: ModelConfig, token_dim: int, num_codes: int) -> "RegressionHead":
        """See `Head.from_config`."""
        return cls(token_dim=token_dim, cond_width=model.width, dtype=jnp.dtype(model.dtype))

    def setup(self) -> None:
        self.mean = Dense((self.cond_width,), (self.token_dim,), ("embed", None), self.dtype)

    @nn.nowrap
    def draw_loss_noise(self, key: jax.Array, batch: int, num_tokens: int) -> tuple[()]:
        """Returns (): the squared error needs no randomness."""
        return ()

    def __call__(self, z_BxLxW: jax.Array, tokens_BxLxD: jax.Array, noise: tuple[()], weight_BxL: jax.Array) -> Terms:
        """The squared error, averaged over D, float32 (B, L); see `Head.__call__`."""
        error = self.mean(z_BxLxW).astype(jnp.float32) - tokens_BxLxD
        return {"loss": (jnp.mean(jnp.square(error), axis=-1), weight_BxL)}

    @nn.nowrap
    def draw_sample_noise(self, key: jax.Array, num_tokens: int, num_sampling_steps: int | str) -> tuple[()]:
        """Returns (): the mean needs no randomness."""
        return ()

    def sample(
        self,
        z: jax.Array,
        noise: tuple[()],
        cfg_scale: jax.Array | None,
        *,
        num_sampling_steps: int | str,
        temperature: float | jax.Array,
    ) -> jax.Array:
        """See `Head.sample`; noise, steps and temperature have no effect."""
        mean = self.mean(z).astype(jnp.float32)
        return mean if cfg_scale is None else cfg.apply_cfg(mean, cfg_scale)

    @nn.nowrap
    def loss_flops(self) -> float:
        """FLOPs of the forward pass per token in training."""
        return 2 * self.cond_width * self.token_dim

    @nn.nowrap
    def sample_flops(self, num_sampling_steps: int | str) -> float:
        """FLOPs of predicting one token, without cfg."""
        return self.loss_flops()
