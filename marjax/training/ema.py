"""The exponential moving average (EMA) of the parameters, which samples are drawn with."""

import jax
import jax.numpy as jnp

from marjax.trees import PyTree


def ema_decay(decay: float, warmup: bool, step: jax.Array) -> jax.Array:
    """The decay of the update that ends step `step`, 0 for the first: float32 ().

    Args:
      decay: the final value.
      warmup: whether it is at most (1 + step) / (10 + step), so that the random initial parameters are soon forgotten.
      step: int ().
    """
    final = jnp.asarray(decay, jnp.float32)
    if not warmup:
        return final
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(final, (1.0 + n) / (10.0 + n))


def update_ema(ema: PyTree, params: PyTree, decay: jax.Array) -> PyTree:
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
