"""The regression head: a linear layer to the token itself, trained by the squared error (the paper's ablation).

It can only ever give the conditional mean. The methods are those of `heads/diffusion.py`.

Shapes: B batch, L or M tokens, D token dimension, W backbone width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marjax.heads import cfg
from marjax.heads.protocol import Terms
from marjax.model_config import ModelConfig
from marjax.nn.layers import Dense


def squared_error(prediction: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean over D of (prediction - tokens)^2, float32 (...)."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - tokens), axis=-1)


class RegressionHead(nn.Module):
    """Predicts a token given z."""

    token_dim: int
    cond_width: int
    dtype: DTypeLike = jnp.float32

    @classmethod
    def from_config(cls, model: ModelConfig, token_dim: int, num_codes: int) -> "RegressionHead":
        """From a resolved `config.model`; tokens may be codes or not."""
        return cls(token_dim=token_dim, cond_width=model.width, dtype=jnp.dtype(model.dtype))

    def setup(self) -> None:
        self.mean = Dense((self.cond_width,), (self.token_dim,), ("embed", None), self.dtype)

    @nn.nowrap
    def draw_loss_noise(self, key: jax.Array, batch: int, num_tokens: int) -> tuple[()]:
        """Nothing: the squared error is not random."""
        return ()

    def __call__(self, z_BxLxW: jax.Array, tokens_BxLxD: jax.Array, noise: tuple[()], weight_BxL: jax.Array) -> Terms:
        """The term of `Head.__call__`, float32 (B, L): the squared error, averaged over D."""
        return {"loss": (squared_error(self.mean(z_BxLxW), tokens_BxLxD), weight_BxL)}

    @nn.nowrap
    def draw_sample_noise(self, key: jax.Array, num_tokens: int, num_sampling_steps: int | str) -> tuple[()]:
        """Nothing: a mean has nothing to draw."""
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
        """Of one token's forward pass in training."""
        return 2 * self.cond_width * self.token_dim

    @nn.nowrap
    def sample_flops(self, num_sampling_steps: int | str) -> float:
        """Of predicting one token, without guidance."""
        return self.loss_flops()
