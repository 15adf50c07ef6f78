"""The pre-norm Transformer block and the scanned stack of them that every backbone uses.

Shapes: B batch, T sequence, W width, H heads, E head width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax.models.layers import Dense, Dropout, LayerNorm, precision

# What the backward pass may keep: everything, the outputs of weight matmuls, or only each layer's input.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, W) -> (B, T, W), softmax in float32."""

    num_heads: int
    attn_dropout: float
    proj_dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxW: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        width = x_BxTxW.shape[-1]
        heads, head_width = self.num_heads, width // self.num_heads
        qkv = Dense((width,), (3, heads, head_width), ("embed", None, "heads", "kv"), self.dtype, name="qkv")(x_BxTxW)
        q_BxTxHxE, k_BxTxHxE, v_BxTxHxE = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores_BxHxTxT = jnp.einsum("bthe,bshe->bhts", q_BxTxHxE * head_width**-0.5, k_BxTxHxE,
                                    precision=precision(self.dtype), preferred_element_type=jnp.float32)
        if mask is not None:
            scores_BxHxTxT = jnp.where(mask, scores_BxHxTxT, jnp.finfo(jnp.float32).min)
        weights_BxHxTxT = jax.nn.softmax(scores_BxHxTxT, axis=-1).astype(self.dtype)
        weights_BxHxTxT = Dropout(self.attn_dropout)(weights_BxHxTxT, deterministic)
        out_BxTxHxE = jnp.einsum("bhts,bshe->bthe", weights_BxHxTxT, v_BxTxHxE, precision=precision(self.dtype))
        out_BxTxW = Dense((heads, head_width), (width,), ("heads", "kv", "embed"), self.dtype, name="proj")(out_BxTxHxE)
        return Dropout(self.proj_dropout)(out_BxTxW, deterministic)


class Mlp(nn.Module):
    """Two dense layers with the exact GELU between them."""

    ratio: float
    proj_dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxW: jax.Array, deterministic: bool) -> jax.Array:
        width = x_BxTxW.shape[-1]
        hidden = int(width * self.ratio)
        h = Dense((width,), (hidden,), ("embed", "mlp"), self.dtype, name="fc1")(x_BxTxW)
        h = Dropout(self.proj_dropout)(nn.gelu(h, approximate=False), deterministic)
        h = Dense((hidden,), (width,), ("mlp", "embed"), self.dtype, name="fc2")(h)
        return Dropout(self.proj_dropout)(h, deterministic)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the ViT block of the reference. A body for `nn.scan`."""

    num_heads: int
    mlp_ratio: float
    attn_dropout: float
    proj_dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxW: jax.Array, mask: jax.Array | None, deterministic: bool) -> tuple[jax.Array, None]:
        attention = Attention(self.num_heads, self.attn_dropout, self.proj_dropout, self.dtype, name="attn")
        mlp = Mlp(self.mlp_ratio, self.proj_dropout, self.dtype, name="mlp")
        x_BxTxW = x_BxTxW + attention(LayerNorm(dtype=self.dtype, name="norm1")(x_BxTxW), mask, deterministic)
        x_BxTxW = x_BxTxW + mlp(LayerNorm(dtype=self.dtype, name="norm2")(x_BxTxW), deterministic)
        return nn.with_logical_constraint(x_BxTxW, ("batch", None, None)), None


class Stack(nn.Module):
    """`depth` blocks under one `lax.scan`: compile time does not grow with depth.

    `mask` is boolean and broadcasts to (B, H, T, T), true where a query may look at a key. Parameters have a leading
    "layers" axis. `remat` is a key of REMAT_POLICIES.
    """

    depth: int
    num_heads: int
    mlp_ratio: float
    attn_dropout: float
    proj_dropout: float
    remat: str
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxW: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        blocks = scanned(Block, self.depth, self.remat, static_argnums=(3,))(
            self.num_heads, self.mlp_ratio, self.attn_dropout, self.proj_dropout, self.dtype, name="blocks")
        x_BxTxW, _ = blocks(x_BxTxW, mask, deterministic)
        return x_BxTxW


def scanned(block: Any, depth: int, remat: str, static_argnums: tuple[int, ...] = ()) -> Any:
    """The module class that applies `depth` copies of `block` in turn: (carry, *shared) -> (carry, None).

    Args:
      block: a module class whose call maps (carry, *shared) to (carry, None).
      depth: number of copies; their parameters are stacked on a new first axis, "layers".
      remat: a key of REMAT_POLICIES.
      static_argnums: which of the shared arguments are Python values; 1 is the carry's place.
    """
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False, static_argnums=static_argnums)
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                   in_axes=nn.broadcast, length=depth, metadata_params={nn.PARTITION_NAME: "layers"})
