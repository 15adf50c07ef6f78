"""The pre-norm Transformer block, and the scanned stack of blocks that both backbones use.

Shapes: B batch, T sequence, L tokens of the KV cache, W width, N heads, E head width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax.model_config import ModelConfig
from marjax.nn.attention import Attention, KeyValue
from marjax.nn.layers import Dense, Dropout, LayerNorm

# What the forward pass saves for the backward pass: everything, outputs of weight matmuls, or only layer inputs.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Mlp(nn.Module):
    """Two dense layers with an exact GELU in between."""

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
    """x + attention(norm(x)), then x + mlp(norm(x)): the ViT block of the reference."""

    num_heads: int
    mlp_ratio: float
    attn_dropout: float
    proj_dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BxTxW: jax.Array, mask: jax.Array | None, deterministic: bool, cache: KeyValue | None = None
    ) -> tuple[jax.Array, KeyValue | None]:
        attention = Attention(self.num_heads, self.attn_dropout, self.proj_dropout, self.dtype, name="attn")
        mlp = Mlp(self.mlp_ratio, self.proj_dropout, self.dtype, name="mlp")
        attended, new = attention(LayerNorm(dtype=self.dtype, name="norm1")(x_BxTxW), mask, deterministic, cache)
        x_BxTxW = x_BxTxW + attended
        x_BxTxW = x_BxTxW + mlp(LayerNorm(dtype=self.dtype, name="norm2")(x_BxTxW), deterministic)
        return nn.with_logical_constraint(x_BxTxW, ("batch", None, None)), new


class Stack(nn.Module):
    """`depth` blocks under one `lax.scan`: compile time does not grow with depth.

    `mask` is boolean and broadcasts to (B, N, T, T), true where a query may attend to a key. Parameters have a leading
    "layers" axis. `remat` is a key of REMAT_POLICIES.
    """

    depth: int
    num_heads: int
    mlp_ratio: float
    attn_dropout: float
    proj_dropout: float
    remat: str
    dtype: Any

    @classmethod
    def from_config(cls, model: ModelConfig, depth: int) -> "Stack":
        """A stack with the settings of a backbone's `config.model`."""
        dropout = model.attn_dropout, model.proj_dropout
        return cls(depth, model.num_heads, model.mlp_ratio, *dropout, model.remat, jnp.dtype(model.dtype))

    def setup(self) -> None:
        self.blocks = Block(self.num_heads, self.mlp_ratio, self.attn_dropout, self.proj_dropout, self.dtype)

    def __call__(self, x_BxTxW: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        def layer(block: Block, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
            return block(x, mask, deterministic)[0], None

        return over_layers(layer, self.depth, self.remat)(self.blocks, x_BxTxW, mask)[0]

    def step(self, x_Bx1xW: jax.Array, mask_L: jax.Array, cache: KeyValue) -> tuple[jax.Array, KeyValue]:
        """Applies the stack to one new token, without dropout; returns its output and its own keys and values.

        The KV cache, (depth, B, N, L, E), is only read: writing one token after the scan over layers takes far less
        memory traffic than carrying the whole cache through the scan.
        """

        def layer(block: Block, x: jax.Array, cache: KeyValue, mask: jax.Array) -> tuple[jax.Array, Any]:
            return block(x, mask, True, cache)

        return over_layers(layer, self.depth, per_layer=(True, False))(self.blocks, x_Bx1xW, cache, mask_L)


def over_layers(
    layer: Callable[..., Any], depth: int, remat: str = "none", per_layer: tuple[bool, ...] = (False,)
) -> Any:
    """Scans over `depth` layers: a function (module, carry, *inputs) -> (carry, outputs).

    Args:
      layer: maps (module, carry, *inputs) to (carry, output) for one layer.
      depth: number of layers; their parameters are stacked along a new first axis, "layers".
      remat: a key of REMAT_POLICIES.
      per_layer: for each input, whether it has a leading layer axis; otherwise all layers share it.
    """
    if remat != "none":
        layer = nn.remat(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=tuple(0 if own else nn.broadcast for own in per_layer),
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
