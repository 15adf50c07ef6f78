"""The exponential moving average (EMA) of the parameters, used for sampling."""

import jax
import jax.numpy as jnp

from marjax.trees import PyTree


def ema_decay(decay: float, warmup: bool, step: jax.Array) -> jax.Array:
    """The decay of the update in step `step`, counted from 0: float32 ().

    With `warmup` it is at most (1 + step) / (10 + step), so that the initial parameters are forgotten quickly.
    """
    final = jnp.asarray(decay, jnp.float32)
    if not warmup:
        return final
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(final, (1.0 + n) / (10.0 + n))


def update_ema(ema: PyTree, params: PyTree, decay: jax.Array) -> PyTree:
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
