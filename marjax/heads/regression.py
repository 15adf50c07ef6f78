"""The regression head: a linear layer to the token itself, trained by the squared error (the paper's ablation).

It can only ever give the conditional mean. The methods are those of `heads/diffusion.py`.

Shapes: B batch, L or M tokens, D token dimension, W backbone width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax.heads import cfg
from marjax.nn.layers import Dense


def squared_error(prediction: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean over D of (prediction - tokens)^2, float32 (...)."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - tokens), axis=-1)


class RegressionHead(nn.Module):
    """Predicts a token given z."""

    token_dim: int
    cond_width: int
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model: Any, token_dim: int, num_codes: int) -> "RegressionHead":
        """From a resolved `config.model`; tokens may be codes or not."""
        del num_codes
        return cls(token_dim=token_dim, cond_width=model.width, dtype=jnp.dtype(model.dtype))

    def setup(self) -> None:
        self.mean = Dense((self.cond_width,), (self.token_dim,), ("embed", None), self.dtype)

    @nn.nowrap
    def draw_loss_noise(self, key: jax.Array, batch: int, num_tokens: int) -> tuple[()]:
        """Nothing: the squared error is not random."""
        del key, batch, num_tokens
        return ()

    def __call__(
        self,
        z_BxLxW: jax.Array,
        tokens_BxLxD: jax.Array,
        noise: tuple[()],
        weight_BxL: jax.Array,
        codebook: jax.Array | None = None,
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The per-token term "loss", float32 (B, L): the squared error, averaged over D; weights as given."""
        del noise, codebook
        return {"loss": (squared_error(self.mean(z_BxLxW), tokens_BxLxD), weight_BxL)}

    @nn.nowrap
    def draw_sample_noise(self, key: jax.Array, num_tokens: int, num_sampling_steps: int | str) -> tuple[()]:
        """Nothing: a mean has nothing to draw."""
        del key, num_tokens, num_sampling_steps
        return ()

    def sample(
        self,
        z: jax.Array,
        noise: tuple[()],
        guidance: jax.Array | None,
        *,
        num_sampling_steps: int | str,
        temperature: float | jax.Array,
        codebook: jax.Array | None = None,
    ) -> jax.Array:
        """The predicted tokens, float32 (B, M, D), from z (B, M, W) or, under guidance, (2 B, M, W).

        Neither noise, steps nor temperature has a meaning here.
        """
        del noise, num_sampling_steps, temperature, codebook
        mean = self.mean(z).astype(jnp.float32)
        return mean if guidance is None else cfg.apply_cfg(mean, guidance)

    @nn.nowrap
    def loss_flops(self) -> float:
        """Of one token's forward pass in training."""
        return 2 * self.cond_width * self.token_dim

    @nn.nowrap
    def sample_flops(self, num_sampling_steps: int | str) -> float:
        """Of predicting one token, without guidance."""
        del num_sampling_steps
        return self.loss_flops()
