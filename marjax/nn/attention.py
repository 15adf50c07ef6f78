"""Multi-head self-attention over a sequence, or from one token to a KV cache.

Shapes: B batch, T sequence, L tokens of the KV cache, W width, N heads, E head width.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax.nn.layers import Dense, Dropout, precision, wide_product


class KeyValue(NamedTuple):
    """A KV cache, `dtype` (B, N, L, E) each; in a stack of layers, with a leading layer axis."""

    key: jax.Array
    value: jax.Array


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, W) -> (B, T, W), softmax in float32.

    With a KV cache, x is one token (T = 1) that attends to itself and to the cached tokens where `mask`, (..., L), is
    true. Its own key and value, (B, N, 1, E), are the second result, which is None without a cache.
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
        q_BxTxNxE, k_BxTxNxE, v_BxTxNxE = qkv.split(x_BxTxW)
        q_BxTxNxE, new = q_BxTxNxE * head_width**-0.5, None

        def average(spec: str, weights: jax.Array, values: jax.Array) -> jax.Array:
            return jnp.einsum(spec, weights, values, precision=precision(self.dtype))

        own = scores = wide_product("btne,bsne->bnts", q_BxTxNxE, k_BxTxNxE)
        if cache is not None:
            scores = wide_product("btne,bnse->bnts", q_BxTxNxE, cache.key)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        if cache is not None:
            scores = jnp.concatenate([scores, own], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = Dropout(self.attn_dropout)(weights, deterministic)
        if cache is None:
            out_BxTxNxE = average("bnts,bsne->btne", weights, v_BxTxNxE)
        else:
            out_BxTxNxE = average("bnts,bnse->btne", weights[..., :-1], cache.value)
            out_BxTxNxE += average("bnts,bsne->btne", weights[..., -1:], v_BxTxNxE)
            new = KeyValue(jnp.swapaxes(k_BxTxNxE, 1, 2), jnp.swapaxes(v_BxTxNxE, 1, 2))
        out_BxTxW = Dense((heads, head_width), (width,), ("heads", "kv", "embed"), self.dtype, name="proj")(out_BxTxNxE)
        return Dropout(self.proj_dropout)(out_BxTxW, deterministic), new
