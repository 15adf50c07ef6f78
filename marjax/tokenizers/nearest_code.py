"""The nearest of a codebook's codes. Shapes: K codes of D values; `...` any leading axes."""

import jax
import jax.numpy as jnp


def nearest(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """The index of the code with the smallest Euclidean distance, the first of equally near ones.

    Distances are sums of squared differences in float32, so that every code maps to itself. |c|^2 - 2xc, a matrix
    multiplication, would round away small distances between long vectors, and is only about three times as fast on CPU,
    where XLA never stores the differences.

    Args:
      x: float (..., D), taken as float32.
      codebook: float32 (K, D).

    Returns:
      int32 (...), in [0, K). Takes memory for K values per row of `x`.
    """
    codes = codebook.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), *codebook.shape)
    difference = x.astype(jnp.float32)[..., None, :] - codes
    return jnp.argmin(jnp.sum(difference**2, -1), -1).astype(jnp.int32)
