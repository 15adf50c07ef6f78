"""The categorical head: a linear layer from z to one logit per code, the cross-entropy baseline (paper, table 1).

Tokens enter and leave as codebook vectors, like continuous tokens; only this head treats them as codes.

Shapes: B batch, L tokens, M tokens predicted in one step, D token dimension, W backbone width, V codebook size.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marjax import numerics
from marjax.heads import cfg
from marjax.heads.protocol import Terms
from marjax.model_config import ModelConfig
from marjax.nn.layers import Dense
from marjax.tokenizers import nearest_code


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """-log p(target) in nats, float32 (...), from logits (..., V) and int (...) in [0, V)."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]


def step_keys(key_data: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Derives two keys per token for one generation step, as raw data like `key_data`, uint32 (..., 2)."""

    def one(data: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.split(jax.random.fold_in(numerics.wrap_key(data), step)))

    both = jax.vmap(one)(key_data.reshape(-1, key_data.shape[-1]))
    return both[:, 0].reshape(key_data.shape), both[:, 1].reshape(key_data.shape)


def gumbel(key_data: jax.Array, num_codes: int) -> jax.Array:
    """Gumbel variates, float32 (..., num_codes), from the raw data of one key per token, uint32 (..., 2)."""
    flat = key_data.reshape(-1, key_data.shape[-1])
    draws = jax.vmap(lambda data: jax.random.gumbel(numerics.wrap_key(data), (num_codes,)))(flat)
    return draws.reshape(*key_data.shape[:-1], num_codes)


def sample_codes(logits: jax.Array, noise: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Samples codes from softmax(logits / temperature), int32 (...), by the Gumbel-max trick.

    `logits` and `noise` (from `gumbel`) are (..., V); `temperature` is at least 0, which takes the argmax.
    """
    return jnp.argmax(logits.astype(jnp.float32) + temperature * noise, axis=-1).astype(jnp.int32)


class CategoricalHead(nn.Module):
    """Models the code of a token given z by a softmax over the codebook, float32 (V, D)."""

    num_codes: int
    cond_width: int
    dtype: DTypeLike = jnp.float32
    codebook: jax.Array | None = None

    @classmethod
    def from_config(cls, model: ModelConfig, token_dim: int, num_codes: int) -> "CategoricalHead":
        """See `Head.from_config`."""
        return cls(num_codes=num_codes, cond_width=model.width, dtype=jnp.dtype(model.dtype))

    def setup(self) -> None:
        self.logits = Dense((self.cond_width,), (self.num_codes,), ("embed", None), self.dtype)

    @nn.nowrap
    def draw_loss_noise(self, key: jax.Array, batch: int, num_tokens: int) -> tuple[()]:
        """Returns (): the cross-entropy needs no randomness."""
        return ()

    def __call__(self, z_BxLxW: jax.Array, tokens_BxLxD: jax.Array, noise: tuple[()], weight_BxL: jax.Array) -> Terms:
        """Cross-entropy in nats and accuracy of the most likely code, float32 (B, L); see `Head.__call__`."""
        target_BxL = nearest_code.nearest(tokens_BxLxD, self._codes())
        logits_BxLxV = self.logits(z_BxLxW)
        hit = (jnp.argmax(logits_BxLxV, axis=-1) == target_BxL).astype(jnp.float32)
        loss = cross_entropy(logits_BxLxV, target_BxL)
        return {"loss": (loss, weight_BxL), "accuracy": (hit, weight_BxL)}

    @nn.nowrap
    def draw_sample_noise(self, key: jax.Array, num_tokens: int, num_sampling_steps: int | str) -> jax.Array:
        """One key per position of an image, as raw data, uint32 (L, 2).

        Gumbel variates are drawn from them when needed: all at once, 256 tokens with 16384 codes take 16 MB per image.
        """
        return jax.random.key_data(jax.random.split(key, num_tokens))

    def sample(
        self,
        z: jax.Array,
        noise: jax.Array,
        cfg_scale: jax.Array | None,
        *,
        num_sampling_steps: int | str,
        temperature: float | jax.Array,
    ) -> jax.Array:
        """See `Head.sample`; `temperature` divides the logits, and 0 takes the most likely code."""
        return self._draw(z, noise, cfg_scale, temperature)[0]

    def sample_ranked(
        self,
        z: jax.Array,
        noise: jax.Array,
        cfg_scale: jax.Array | None,
        *,
        step: jax.Array,
        choice: jax.Array,
        num_sampling_steps: int | str,
        temperature: float | jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Samples tokens and a confidence for each, float32 (B, M) (MaskGIT, section 3.2).

        The confidence is log p of the sampled code plus `choice`, MaskGIT's annealed choice temperature, times a Gumbel
        variate. Tokens that are not kept are resampled at the next `step`, an int scalar unique to each step.
        """
        for_code, for_choice = step_keys(noise, step)
        tokens, log_p = self._draw(z, for_code, cfg_scale, temperature)
        return tokens, log_p + choice * gumbel(for_choice, 1)[..., 0]

    def _draw(
        self, z: jax.Array, noise: jax.Array, cfg_scale: jax.Array | None, temperature: float | jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits = self.logits(z)
        if cfg_scale is not None:
            logits = cfg.apply_cfg(logits, cfg_scale)
        code = sample_codes(logits, gumbel(noise, self.num_codes), temperature)
        return self._codes()[code], -cross_entropy(logits, code)

    @nn.nowrap
    def _codes(self) -> jax.Array:
        if self.codebook is None:
            raise ValueError("CategoricalHead.codebook is None, expected float32 (V, D); use Generator.with_codebook")
        return self.codebook

    @nn.nowrap
    def loss_flops(self) -> float:
        """FLOPs of the forward pass per token in training."""
        return 2 * self.cond_width * self.num_codes

    @nn.nowrap
    def sample_flops(self, num_sampling_steps: int | str) -> float:
        """FLOPs of sampling one token, without cfg."""
        return self.loss_flops()
