"""Classifier-free guidance, cfg (Ho and Salimans 2022), of a head's prediction: noise, logits or a mean."""

import jax
import jax.numpy as jnp


def apply_cfg(prediction: jax.Array, scale: jax.Array) -> jax.Array:
    """unconditional + scale (conditional - unconditional): float32 (B, ...) from (2 B, ...), conditional half first."""
    conditional, unconditional = jnp.split(prediction.astype(jnp.float32), 2, axis=0)
    return unconditional + scale * (conditional - unconditional)
