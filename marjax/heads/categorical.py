"""Cross-entropy over a codebook and sampling from it: the baseline of the paper's table 1.

Shapes: `...` any leading axes of tokens, K codes.
"""

import jax
import jax.numpy as jnp

from marjax import numerics


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


def sample(logits: jax.Array, noise: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Codes from softmax(logits / temperature), int32 (...), by the Gumbel-max trick; 0 is the argmax.

    Args:
      logits: (..., K).
      noise: from `gumbel`, (..., K).
      temperature: at least 0.
    """
    return jnp.argmax(logits.astype(jnp.float32) + temperature * noise, axis=-1).astype(jnp.int32)
