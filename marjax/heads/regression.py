"""The squared error: what is left of the diffusion loss without a distribution (paper, section 5, "MSE loss").

Shapes: `...` any leading axes of tokens, D token dimension.
"""

import jax
import jax.numpy as jnp


def squared_error(prediction: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean over D of (prediction - tokens)^2, float32 (...)."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - tokens), axis=-1)
