"""The categorical head: a linear layer to one logit a code, the cross-entropy baseline of the paper's table 1.

Tokens come in and go out as vectors of the codebook, through the same projections as any others; only here are they
codes. The methods are those of `heads/diffusion.py`, and one more for orders made on the fly.

Shapes: B batch, L or M tokens, D token dimension, W backbone width, K codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax import numerics
from marjax.heads import cfg
from marjax.nn.layers import Dense
from marjax.tokenizers import nearest_code


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """-log p(target) in nats, float32 (...), from logits (..., K) and int (...) in [0, K)."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]


def step_keys(key_data: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two fresh keys a token for one generation step, as raw data like `key_data`, uint32 (..., 2)."""

    def one(data: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.split(jax.random.fold_in(numerics.wrap_key(data), step)))

    both = jax.vmap(one)(key_data.reshape(-1, key_data.shape[-1]))
    return both[:, 0].reshape(key_data.shape), both[:, 1].reshape(key_data.shape)


def gumbel(key_data: jax.Array, num_codes: int) -> jax.Array:
    """One Gumbel variate a code, float32 (..., K), from the raw data of a key a token, uint32 (..., 2)."""
    flat = key_data.reshape(-1, key_data.shape[-1])
    draws = jax.vmap(lambda data: jax.random.gumbel(numerics.wrap_key(data), (num_codes,)))(flat)
    return draws.reshape(*key_data.shape[:-1], num_codes)


def sample_codes(logits: jax.Array, noise: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Codes from softmax(logits / temperature), int32 (...), by the Gumbel-max trick; 0 is the argmax.

    Args:
      logits: (..., K).
      noise: from `gumbel`, (..., K).
      temperature: at least 0.
    """
    return jnp.argmax(logits.astype(jnp.float32) + temperature * noise, axis=-1).astype(jnp.int32)


class CategoricalHead(nn.Module):
    """Models a token's code given z by a softmax."""

    num_codes: int
    cond_width: int
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model: Any, token_dim: int, num_codes: int) -> "CategoricalHead":
        """From a resolved `config.model`."""
        del token_dim
        return cls(num_codes=num_codes, cond_width=model.width, dtype=jnp.dtype(model.dtype))

    def setup(self) -> None:
        self.logits = Dense((self.cond_width,), (self.num_codes,), ("embed", None), self.dtype)

    @nn.nowrap
    def draw_loss_noise(self, key: jax.Array, batch: int, num_tokens: int) -> tuple[()]:
        """Nothing: the cross-entropy is not random."""
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
        """Per-token terms, float32 (B, L): "loss", the cross-entropy in nats, and "accuracy" of the likeliest code.

        Args:
          z_BxLxW: float.
          tokens_BxLxD: float, rows of the codebook.
          noise: from `draw_loss_noise`.
          weight_BxL: 1 where the token counts.
          codebook: float32 (K, D).
        """
        del noise
        target_BxL = nearest_code.nearest(tokens_BxLxD, _needed(codebook))
        logits_BxLxK = self.logits(z_BxLxW)
        hit = (jnp.argmax(logits_BxLxK, axis=-1) == target_BxL).astype(jnp.float32)
        loss = cross_entropy(logits_BxLxK, target_BxL)
        return {"loss": (loss, weight_BxL), "accuracy": (hit, weight_BxL)}

    @nn.nowrap
    def draw_sample_noise(self, key: jax.Array, num_tokens: int, num_sampling_steps: int | str) -> jax.Array:
        """What `sample` needs for one image: a key a position, as raw data, uint32 (L, 2).

        The K Gumbel variates of a token are drawn where they are used: of all positions they would be 16 MB an image
        for 256 tokens and 16384 codes.
        """
        del num_sampling_steps
        return jax.random.key_data(jax.random.split(key, num_tokens))

    def sample(
        self,
        z: jax.Array,
        noise: jax.Array,
        guidance: jax.Array | None,
        *,
        num_sampling_steps: int | str,
        temperature: float | jax.Array,
        codebook: jax.Array | None = None,
    ) -> jax.Array:
        """Tokens float32 (B, M, D), rows of the codebook.

        Args:
          z: (B, M, W), or under guidance (2 B, M, W), the conditional half first.
          noise: uint32 (B, M, 2).
          guidance: the scale, a scalar, or None for no guidance.
          num_sampling_steps: not used.
          temperature: divides the logits; 0 takes the likeliest code.
          codebook: float32 (K, D).
        """
        del num_sampling_steps
        return self._draw(z, noise, guidance, temperature, _needed(codebook))[0]

    def sample_ranked(
        self,
        z: jax.Array,
        noise: jax.Array,
        guidance: jax.Array | None,
        *,
        step: jax.Array,
        choice: jax.Array,
        num_sampling_steps: int | str,
        temperature: float | jax.Array,
        codebook: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens as `sample` draws them, and how sure of each the head is, float32 (B, M) (MaskGIT, section 3.2).

        The confidence is log p of the drawn code plus `choice` times a Gumbel variate, so that the choice of what to
        keep is random too; `choice` is MaskGIT's choice temperature, annealed. A token that is not kept is drawn anew
        at the next `step`, an int scalar that differs from step to step.
        """
        del num_sampling_steps
        for_code, for_choice = step_keys(noise, step)
        tokens, log_p = self._draw(z, for_code, guidance, temperature, _needed(codebook))
        return tokens, log_p + choice * gumbel(for_choice, 1)[..., 0]

    def _draw(
        self,
        z: jax.Array,
        noise: jax.Array,
        scale: jax.Array | None,
        temperature: float | jax.Array,
        codebook: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        logits = self.logits(z)
        if scale is not None:
            logits = cfg.apply_cfg(logits, scale)
        code = sample_codes(logits, gumbel(noise, self.num_codes), temperature)
        return codebook[code], -cross_entropy(logits, code)

    @nn.nowrap
    def loss_flops(self) -> float:
        """Of one token's forward pass in training."""
        return 2 * self.cond_width * self.num_codes

    @nn.nowrap
    def sample_flops(self, num_sampling_steps: int | str) -> float:
        """Of sampling one token, without guidance."""
        del num_sampling_steps
        return self.loss_flops()


def _needed(codebook: jax.Array | None) -> jax.Array:
    if codebook is None:
        raise ValueError("the categorical head needs the tokenizer's codebook, float32 (codes, D)")
    return codebook
