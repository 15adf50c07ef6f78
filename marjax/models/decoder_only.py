"""The causal backbone: a decoder-only Transformer over the tokens in the order of generation (paper, section 4.1).

The input is the class token followed by the tokens with their positions; each element predicts the next token. The
position embedding of the token to predict is added before the second half of the stack.

Shapes: B batch, L tokens, D token dimension, W width, M tokens predicted in one step (1 here), N heads, E head width.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax import orders
from marjax.model_config import ModelConfig
from marjax.nn.attention import KeyValue
from marjax.nn.layers import Dense, LayerNorm, embedding_init, parameter
from marjax.nn.transformer import Stack
from marjax.perf import flops
from marjax.trees import PyTree


class KVCache(NamedTuple):
    """Keys and values of both halves of the stack, `dtype` (depth, B, N, L, E), in the order of generation."""

    first: KeyValue
    second: KeyValue


class DecoderOnly(nn.Module):
    """Computes z for every position from the tokens before it in the order and the class embedding.

    `kv_cache=False` recomputes the whole sequence at every generation step, as a baseline for tests and benchmarks.
    """

    model: ModelConfig
    num_tokens: int
    token_dim: int
    kv_cache: bool = True

    @classmethod
    def from_config(cls, model: ModelConfig, num_tokens: int, token_dim: int) -> "DecoderOnly":
        """See `Backbone.from_config`; the depth is the sum of both depths."""
        return cls(model, num_tokens, token_dim)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.model.dtype)

    def setup(self) -> None:
        def embedding(name: str, length: int) -> jax.Array:
            return parameter(self, name, embedding_init, (length, self.model.width))

        self.z_proj = Dense((self.token_dim,), (self.model.width,), (None, "embed"), self.dtype)
        self.z_proj_norm = LayerNorm(dtype=self.dtype)
        self.pos_embed = embedding("pos_embed", 1 + self.num_tokens)  # row 0: class token
        self.first = Stack.from_config(self.model, self.model.encoder_depth)
        self.target_pos_embed = embedding("target_pos_embed", self.num_tokens)
        self.second = Stack.from_config(self.model, self.model.decoder_depth)
        self.norm = LayerNorm(dtype=self.dtype)

    @nn.nowrap
    def draw_num_known(self, key: jax.Array, batch: int) -> jax.Array:
        """Returns 0, int32 (B,): the loss covers every token."""
        return jnp.zeros((batch,), jnp.int32)

    def __call__(
        self,
        tokens_BxLxD: jax.Array,
        order_BxL: jax.Array,
        num_known_B: jax.Array,
        class_embed_BxW: jax.Array,
        *,
        slots: int | None = None,
        deterministic: bool,
    ) -> jax.Array:
        """Computes z, `dtype` (B, L, W): at position order[i] it depends on the tokens at order[:i].

        See `Backbone.__call__`; `num_known_B` and `slots` have no effect.
        """
        batch, length = order_BxL.shape
        rank_BxL = orders.ranks(order_BxL)
        before = order_BxL[:, :-1]  # positions of the inputs after the class token

        def by_position(table_LxW: jax.Array, position: jax.Array) -> jax.Array:
            table = jnp.broadcast_to(table_LxW, (batch, length, self.model.width))
            return orders.gather_rows(table, position, rank_BxL).astype(self.dtype)

        x = self.z_proj(orders.gather_rows(tokens_BxLxD, before, rank_BxL)) + by_position(self.pos_embed[1:], before)
        x = jnp.concatenate([self._class_token(class_embed_BxW), x], axis=1)
        x = nn.with_logical_constraint(self.z_proj_norm(x), ("batch", None, None))
        causal = jnp.tril(jnp.ones((length, length), bool))
        x = self.first(x, causal, deterministic)
        x = self.second(x + by_position(self.target_pos_embed, order_BxL), causal, deterministic)
        return orders.gather_rows(self.norm(x), rank_BxL, order_BxL)

    @nn.nowrap
    def init_cache(self, batch: int) -> KVCache | tuple[()]:
        """An empty KV cache for the first `step`."""
        if not self.kv_cache:
            return ()

        def empty(depth: int) -> KeyValue:
            shape = (depth, batch, self.model.num_heads, self.num_tokens, self.model.width // self.model.num_heads)
            axes = ("layers", "batch", "heads", None, "kv")
            return KeyValue(*(nn.with_logical_constraint(jnp.zeros(shape, self.dtype), axes) for _ in range(2)))

        return KVCache(empty(self.model.encoder_depth), empty(self.model.decoder_depth))

    def step(
        self,
        cache: PyTree,
        tokens_BxLxD: jax.Array,
        order_BxL: jax.Array,
        start: jax.Array,
        position_BxM: jax.Array,
        class_embed_BxW: jax.Array,
        *,
        known_slots: int,
    ) -> tuple[jax.Array, PyTree]:
        """Computes z of the token at `order[start]`, (B, 1, W), and appends to the KV cache; see `Backbone.step`.

        Of the tokens only the one at order[start - 1] is read. `known_slots` has no effect: the cache has L slots.
        """
        if not self.kv_cache:
            z = self(tokens_BxLxD, order_BxL, start, class_embed_BxW, deterministic=True)
            return jnp.take_along_axis(z, position_BxM[..., None], axis=1), ()
        last_Bx1 = jax.lax.dynamic_slice_in_dim(order_BxL, jnp.maximum(start - 1, 0), 1, axis=1)
        token = jnp.take_along_axis(tokens_BxLxD, last_Bx1[..., None], axis=1)
        x = self.z_proj(token) + self.pos_embed[1 + last_Bx1].astype(self.dtype)
        x = self.z_proj_norm(jnp.where(start == 0, self._class_token(class_embed_BxW), x))
        seen = jnp.arange(self.num_tokens) < start
        x, first = self.first.step(x, seen, cache.first)
        x = x + self.target_pos_embed[position_BxM].astype(self.dtype)
        x, second = self.second.step(x, seen, cache.second)

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=3)

        return self.norm(x), jax.tree.map(write, cache, KVCache(first, second))

    def _class_token(self, class_embed_BxW: jax.Array) -> jax.Array:
        return (class_embed_BxW + self.pos_embed[:1]).astype(self.dtype)[:, None]

    @nn.nowrap
    def train_flops(self) -> float:
        """FLOPs of the forward pass per image, counting only unmasked pairs of query and key."""
        length = self.num_tokens
        pairs = length * (length + 1) / 2
        return 2 * self.token_dim * self.model.width * (length - 1) + self._stack_flops(length, pairs)

    @nn.nowrap
    def unknown_in_training(self) -> float:
        """The number of tokens per image in the loss."""
        return self.num_tokens

    @nn.nowrap
    def step_flops(self, num_known: float) -> float:
        """FLOPs of one generation step per image, given `num_known` tokens."""
        return 2 * self.token_dim * self.model.width + self._stack_flops(1, num_known + 1)

    @nn.nowrap
    def _stack_flops(self, length: float, pairs: float) -> float:
        depth = self.model.encoder_depth + self.model.decoder_depth
        return flops.stack_flops(self.model.width, depth, self.model.mlp_ratio, length, pairs)

    @nn.nowrap
    def padded_step_flops(self, known_slots: int) -> float:
        """FLOPs of a step in a padded stage: the same in every stage, since the KV cache has a static shape."""
        return self.step_flops(self.num_tokens)
