"""The denoising MLP of the diffusion head, applied to each token independently (paper, section 4.2 and figure 2).

Shapes: `...` leading axes of tokens, D token dimension, W backbone width, V_d denoiser width, K timesteps.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from marjax.nn.layers import Dense, LayerNorm, lookup, normal_002
from marjax.nn.transformer import over_layers

FREQUENCIES = 256  # width of the sinusoidal timestep features


def sinusoid(t: jax.Array) -> jax.Array:
    """Cosines and sines of t at 128 frequencies from 1 to 1/10000: float32 (..., 256)."""
    half = FREQUENCIES // 2
    frequencies = jnp.asarray(np.exp(-np.log(10000.0) * np.arange(half) / half), jnp.float32)
    angles = t.astype(jnp.float32)[..., None] * jnp.expand_dims(frequencies, range(t.ndim))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbed(nn.Module):
    """Embeds timesteps, sinusoidal features through an MLP: (...) -> (..., V_d)."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        h = Dense((FREQUENCIES,), (self.width,), (None, "embed"), self.dtype, normal_002, name="fc1")(sinusoid(t))
        return Dense((self.width,), (self.width,), ("embed", None), self.dtype, normal_002, name="fc2")(nn.silu(h))


class ResBlock(nn.Module):
    """x + gate * MLP(LN(x) (1 + scale) + shift), with shift, scale and gate linear in the condition."""

    width: int
    dtype: DTypeLike

    def setup(self) -> None:
        width, dtype = self.width, self.dtype
        # Replicated over "tensor", which shards tokens (see DiffusionHead): activations are larger than these weights.
        self.modulation = Dense((width,), (3, width), ("embed", None, None), dtype, nn.initializers.zeros)
        self.norm = LayerNorm(dtype=dtype)
        self.fc1 = Dense((width,), (width,), ("embed", None), dtype)
        self.fc2 = Dense((width,), (width,), (None, "embed"), dtype)

    def modulate(self, condition: jax.Array) -> tuple[jax.Array, ...]:
        """Shift, scale and gate, (..., V_d) each, from (..., V_d)."""
        return self.modulation.split(condition)

    def __call__(self, x: jax.Array, modulation: tuple[jax.Array, ...]) -> jax.Array:
        shift, scale, gate = modulation
        h = nn.silu(self.fc1(self.norm(x) * (1.0 + scale) + shift))
        return x + gate * self.fc2(h)


class Modulation(NamedTuple):
    """The denoiser's modulation by K timesteps and the z of tokens (...).

    `blocks` are shift, scale and gate, `dtype` (depth, K, ..., V_d) each; `final`, shift and scale, (K, ..., V_d).
    """

    blocks: tuple[jax.Array, ...]
    final: tuple[jax.Array, ...]


class Denoiser(nn.Module):
    """Predicts the noise and the interpolation of the log variance, (..., 2 D), from x_t, t and z.

    A timestep has `num_steps` possible values: their embeddings are computed once per call and gathered.
    """

    token_dim: int
    depth: int
    width: int
    cond_width: int
    num_steps: int = 1000
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        width, dtype = self.width, self.dtype
        self.time_embed = TimeEmbed(width, dtype)
        self.cond_embed = Dense((self.cond_width,), (width,), ("embed", None), dtype)
        self.input_proj = Dense((self.token_dim,), (width,), (None, "embed"), dtype)
        self.blocks = ResBlock(width, dtype)
        self.final_norm = LayerNorm(affine=False, dtype=dtype)
        self.final_modulation = Dense((width,), (2, width), ("embed", None, None), dtype, nn.initializers.zeros)
        self.final_linear = Dense((width,), (2 * self.token_dim,), ("embed", None), dtype, nn.initializers.zeros)

    def __call__(self, x: jax.Array, t: jax.Array, z: jax.Array) -> jax.Array:
        """Takes x_t float (..., D), t int (...) and z float (..., W), which broadcast against each other."""

        def layer(block: ResBlock, h: jax.Array, condition: jax.Array) -> tuple[jax.Array, None]:
            return block(h, block.modulate(condition)), None

        time = lookup(self.time_embed(jnp.arange(self.num_steps)), t) if t.ndim else self.time_embed(t)
        condition = nn.silu(time + self.cond_embed(z))
        h, _ = over_layers(layer, self.depth, self.remat)(self.blocks, self.input_proj(x), condition)
        return self._output(h, self.final_modulation.split(condition))

    def embed_z(self, z: jax.Array) -> jax.Array:
        """The part of the modulation's input that depends on z alone: (..., V_d) from (..., W)."""
        return self.cond_embed(z)

    def modulate(self, t_K: jax.Array, z_embed: jax.Array) -> Modulation:
        """Modulation for K timesteps, int (K,), and `embed_z(z)`, (..., V_d).

        It holds three fifths of the network's FLOPs and does not depend on x: samplers compute it for several steps
        at once, reading the weights once.
        """

        def layer(block: ResBlock, none: None, condition: jax.Array) -> tuple[None, tuple[jax.Array, ...]]:
            return none, block.modulate(condition)

        time = self.time_embed(t_K)
        condition = nn.silu(time.reshape(len(t_K), *(1,) * (z_embed.ndim - 1), -1) + z_embed[None])
        _, blocks = over_layers(layer, self.depth)(self.blocks, None, condition)
        return Modulation(blocks, self.final_modulation.split(condition))

    def predict(self, x: jax.Array, modulation: Modulation, i: jax.Array) -> jax.Array:
        """The prediction (..., 2 D) for x_t (..., D) at the i-th timestep of `modulate`."""

        def layer(block: ResBlock, h: jax.Array, modulation: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            return block(h, modulation), None

        blocks = tuple(part[:, i] for part in modulation.blocks)
        h, _ = over_layers(layer, self.depth, per_layer=(True,))(self.blocks, self.input_proj(x), blocks)
        return self._output(h, tuple(part[i] for part in modulation.final))

    def _output(self, h: jax.Array, modulation: tuple[jax.Array, ...]) -> jax.Array:
        shift, scale = modulation
        return self.final_linear(self.final_norm(h) * (1.0 + scale) + shift)
