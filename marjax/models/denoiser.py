"""The denoising MLP of the diffusion head, applied to each token by itself (paper, section 4.2 and figure 2).

Shapes: `...` any leading axes of tokens, D token dimension, W backbone width, V denoiser width, T diffusion steps.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from marjax.models.layers import Dense, LayerNorm, lookup, normal_002
from marjax.models.transformer import scanned

FREQUENCIES = 256  # width of the sinusoidal timestep features


def sinusoid(t: jax.Array) -> jax.Array:
    """Cosines, then sines, of t at 128 frequencies from 1 down to 1/10000: float32 (..., 256)."""
    half = FREQUENCIES // 2
    frequencies = jnp.asarray(np.exp(-np.log(10000.0) * np.arange(half) / half), jnp.float32)
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbed(nn.Module):
    """The MLP on the sinusoidal features of a timestep: (...) -> (..., V)."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        h = Dense((FREQUENCIES,), (self.width,), (None, "embed"), self.dtype, normal_002, name="fc1")(sinusoid(t))
        return Dense((self.width,), (self.width,), ("embed", None), self.dtype, normal_002, name="fc2")(nn.silu(h))


class ResBlock(nn.Module):
    """x + gate * MLP(LN(x) (1 + scale) + shift), with shift, scale and gate linear in `condition`. A scan body."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> tuple[jax.Array, None]:
        width = self.width
        modulation = Dense((width,), (3, width), ("embed", None, "mlp"), self.dtype, nn.initializers.zeros,
                           name="modulation")(condition)
        shift, scale, gate = modulation[..., 0, :], modulation[..., 1, :], modulation[..., 2, :]
        h = LayerNorm(dtype=self.dtype, name="norm")(x) * (1.0 + scale) + shift
        h = nn.silu(Dense((width,), (width,), ("embed", "mlp"), self.dtype, name="fc1")(h))
        h = Dense((width,), (width,), ("mlp", "embed"), self.dtype, name="fc2")(h)
        return x + gate * h, None


class Denoiser(nn.Module):
    """Predicts the noise and the log variance's interpolation: (..., 2 D) from x_t, t and z.

    A timestep has only `num_steps` values, so its embedding is a table, computed once a call and gathered.
    """

    token_dim: int
    depth: int
    width: int
    cond_width: int
    num_steps: int = 1000
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        width, dtype = self.width, self.dtype
        self.time_embed = TimeEmbed(width, dtype)
        self.cond_embed = Dense((self.cond_width,), (width,), ("embed", None), dtype)
        self.input_proj = Dense((self.token_dim,), (width,), (None, "embed"), dtype)
        self.blocks = scanned(ResBlock, self.depth, self.remat)(width, dtype)
        self.final_norm = LayerNorm(affine=False, dtype=dtype)
        self.final_modulation = Dense((width,), (2, width), ("embed", None, "mlp"), dtype, nn.initializers.zeros)
        self.final_linear = Dense((width,), (2 * self.token_dim,), ("embed", None), dtype, nn.initializers.zeros)

    def __call__(self, x: jax.Array, t: jax.Array, z: jax.Array) -> jax.Array:
        """Args: x_t float (..., D); t int (...); z float (..., W); all broadcast against each other."""
        return self.predict(x, t, self.embed_condition(z))

    def embed_condition(self, z: jax.Array) -> jax.Array:
        """The part of the modulation's input that does not depend on t: (..., V) from z (..., W)."""
        return self.cond_embed(z)

    def predict(self, x: jax.Array, t: jax.Array, condition: jax.Array) -> jax.Array:
        """The prediction given `embed_condition(z)`; a scalar t embeds just that timestep."""
        time = lookup(self.time_embed(jnp.arange(self.num_steps)), t) if t.ndim else self.time_embed(t)
        condition = nn.silu(time + condition)
        h, _ = self.blocks(self.input_proj(x), condition)
        modulation = self.final_modulation(condition)
        h = self.final_norm(h) * (1.0 + modulation[..., 1, :]) + modulation[..., 0, :]
        return self.final_linear(h)
