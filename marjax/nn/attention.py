"""Multi-head self-attention, over a whole sequence or of one token over a KV cache.

Shapes: B batch, T sequence, S cached tokens, K keys a query may look at (T, or S + 1), W width, H heads, E head width.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax.nn.layers import Dense, Dropout, precision, wide_product


class KeyValue(NamedTuple):
    """Keys and values of the tokens seen so far, `dtype` (B, H, S, E) each; of a stack, with its layers in front."""

    key: jax.Array
    value: jax.Array


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, W) -> (B, T, W), softmax in float32.

    With a cache x is one token (T = 1) that looks at itself and at the cached ones where `mask`, (..., S), is true;
    its own key and value, (B, H, 1, E), come back beside the result (None without a cache).
    """

    num_heads: int
    attn_dropout: float
    proj_dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BxTxW: jax.Array, mask: jax.Array | None, deterministic: bool, cache: KeyValue | None = None
    ) -> tuple[jax.Array, KeyValue | None]:
        width = x_BxTxW.shape[-1]
        heads, head_width = self.num_heads, width // self.num_heads
        qkv = Dense((width,), (3, heads, head_width), ("embed", None, "heads", "kv"), self.dtype, name="qkv")
        q_BxTxHxE, k_BxTxHxE, v_BxTxHxE = qkv.split(x_BxTxW)
        q_BxTxHxE, new = q_BxTxHxE * head_width**-0.5, None

        def scores(spec: str, keys: jax.Array) -> jax.Array:
            return wide_product(spec, q_BxTxHxE, keys)

        def mixed(spec: str, weights: jax.Array, values: jax.Array) -> jax.Array:
            return jnp.einsum(spec, weights, values, precision=precision(self.dtype))

        scores_BxHxTxK = scores("bthe,bshe->bhts", k_BxTxHxE)
        if cache is not None:
            own = scores_BxHxTxK
            scores_BxHxTxK = scores("bthe,bhse->bhts", cache.key)
        if mask is not None:
            scores_BxHxTxK = jnp.where(mask, scores_BxHxTxK, jnp.finfo(jnp.float32).min)
        if cache is not None:
            scores_BxHxTxK = jnp.concatenate([scores_BxHxTxK, own], axis=-1)
        weights_BxHxTxK = jax.nn.softmax(scores_BxHxTxK, axis=-1).astype(self.dtype)
        weights_BxHxTxK = Dropout(self.attn_dropout)(weights_BxHxTxK, deterministic)
        if cache is None:
            out_BxTxHxE = mixed("bhts,bshe->bthe", weights_BxHxTxK, v_BxTxHxE)
        else:
            out_BxTxHxE = mixed("bhts,bhse->bthe", weights_BxHxTxK[..., :-1], cache.value) + mixed(
                "bhts,bshe->bthe", weights_BxHxTxK[..., -1:], v_BxTxHxE
            )
            new = KeyValue(jnp.swapaxes(k_BxTxHxE, 1, 2), jnp.swapaxes(v_BxTxHxE, 1, 2))
        out_BxTxW = Dense((heads, head_width), (width,), ("heads", "kv", "embed"), self.dtype, name="proj")(out_BxTxHxE)
        return Dropout(self.proj_dropout)(out_BxTxW, deterministic), new
