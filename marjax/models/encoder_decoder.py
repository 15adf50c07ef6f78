"""The bidirectional backbone: an MAE-style encoder over the known tokens and a decoder over all (paper, section 4.1).

All shapes are static: the encoder has `slots` slots, filled in the order of generation. Slots past `num_known` are
masked as keys, and gathers move the encoder's output to raster positions.

Shapes: B batch, L tokens, D token dimension, W width, S encoder slots, P buffer tokens, M tokens predicted in one step.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax import orders
from marjax.model_config import ModelConfig
from marjax.nn.layers import Dense, LayerNorm, embedding_init, parameter, vector_init
from marjax.nn.transformer import Stack
from marjax.perf import flops


class EncoderDecoder(nn.Module):
    """Computes z for every position from the known tokens and the class embedding."""

    model: ModelConfig
    num_tokens: int
    token_dim: int

    @classmethod
    def from_config(cls, model: ModelConfig, num_tokens: int, token_dim: int) -> "EncoderDecoder":
        """See `Backbone.from_config`."""
        return cls(model, num_tokens, token_dim)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.model.dtype)

    def setup(self) -> None:
        def embedding(name: str, length: int) -> jax.Array:
            return parameter(self, name, embedding_init, (length, self.model.width))

        length = self.model.buffer_size + self.num_tokens
        self.z_proj = Dense((self.token_dim,), (self.model.width,), (None, "embed"), self.dtype)
        self.z_proj_norm = LayerNorm(dtype=self.dtype)
        self.encoder_pos_embed = embedding("encoder_pos_embed", length)
        self.encoder = Stack.from_config(self.model, self.model.encoder_depth)
        self.encoder_norm = LayerNorm(dtype=self.dtype)
        self.decoder_embed = Dense((self.model.width,), (self.model.width,), ("embed", None), self.dtype)
        self.mask_token = parameter(self, "mask_token", vector_init, (self.model.width,))
        self.decoder_pos_embed = embedding("decoder_pos_embed", length)
        self.decoder = Stack.from_config(self.model, self.model.decoder_depth)
        self.decoder_norm = LayerNorm(dtype=self.dtype)
        self.z_pos_embed = embedding("z_pos_embed", self.num_tokens)

    @nn.nowrap
    def draw_num_known(self, key: jax.Array, batch: int) -> jax.Array:
        """See `Backbone.draw_num_known`; draws from `mask_ratio`."""
        return self.model.mask_ratio.draw_num_known(key, batch, self.num_tokens)

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
        """Computes z for every position, `dtype` (B, L, W); see `Backbone.__call__`."""
        if slots is None:
            slots = orders.max_visible(self.num_tokens, self.model.mask_ratio.minimum)
        known_BxSxW = self.encode(
            tokens_BxLxD, order_BxL, num_known_B, class_embed_BxW, slots=slots, deterministic=deterministic
        )
        return self.decode(known_BxSxW, order_BxL, num_known_B, deterministic=deterministic)

    def encode(
        self,
        tokens_BxLxD: jax.Array,
        order_BxL: jax.Array,
        num_known_B: jax.Array,
        class_embed_BxW: jax.Array,
        *,
        slots: int,
        deterministic: bool,
    ) -> jax.Array:
        """The encoder's output for buffer and slots, (B, P + S, W); rows past P + num_known are undefined."""
        batch, buffer = tokens_BxLxD.shape[0], self.model.buffer_size
        rank_BxL = orders.ranks(order_BxL)
        chosen_BxS = order_BxL[:, :slots]
        tokens_BxSxD = orders.gather_rows(tokens_BxLxD, chosen_BxS, rank_BxL)
        pos_BxLxW = jnp.broadcast_to(self.encoder_pos_embed[buffer:], (batch, self.num_tokens, self.model.width))
        x_BxSxW = self.z_proj(tokens_BxSxD) + orders.gather_rows(pos_BxLxW, chosen_BxS, rank_BxL).astype(self.dtype)
        x_BxPxW = (class_embed_BxW[:, None] + self.encoder_pos_embed[None, :buffer]).astype(self.dtype)
        x = self.z_proj_norm(jnp.concatenate([x_BxPxW, x_BxSxW], axis=1))
        known_BxT = jnp.arange(buffer + slots)[None] < buffer + num_known_B[:, None]
        x = self.encoder(
            nn.with_logical_constraint(x, ("batch", None, None)), known_BxT[:, None, None, :], deterministic
        )
        return self.encoder_norm(x)

    def decode(
        self, encoded: jax.Array, order_BxL: jax.Array, num_known_B: jax.Array, *, deterministic: bool
    ) -> jax.Array:
        """Computes z for every position, (B, L, W), from the encoder's output, (B, P + S, W)."""
        buffer, num_tokens = self.model.buffer_size, self.num_tokens
        slots = encoded.shape[1] - buffer
        encoded = self.decoder_embed(encoded)
        # The slot of a position is its rank. Unknown positions and unused slots have indices out of range: zeros.
        rank_BxL = orders.ranks(order_BxL)
        known_BxL = rank_BxL < num_known_B[:, None]
        slot_BxL = jnp.where(known_BxL, rank_BxL, slots)
        position_BxS = jnp.where(jnp.arange(slots)[None] < num_known_B[:, None], order_BxL[:, :slots], num_tokens)
        x_BxLxW = orders.gather_rows(encoded[:, buffer:], slot_BxL, position_BxS)
        x_BxLxW = jnp.where(known_BxL[..., None], x_BxLxW, self.mask_token.astype(self.dtype))
        x = jnp.concatenate([encoded[:, :buffer], x_BxLxW], axis=1) + self.decoder_pos_embed[None].astype(self.dtype)
        x = self.decoder(nn.with_logical_constraint(x, ("batch", None, None)), None, deterministic)
        return self.decoder_norm(x)[:, buffer:] + self.z_pos_embed[None].astype(self.dtype)

    @nn.nowrap
    def init_cache(self, batch: int) -> tuple[()]:
        """Returns (): every step encodes all known tokens."""
        return ()

    def step(
        self,
        cache: tuple[()],
        tokens_BxLxD: jax.Array,
        order_BxL: jax.Array,
        start: jax.Array,
        position_BxM: jax.Array,
        class_embed_BxW: jax.Array,
        *,
        known_slots: int,
    ) -> tuple[jax.Array, tuple[()]]:
        """Computes z at the positions of one generation step, (B, M, W); see `Backbone.step`."""
        known_B = jnp.full((tokens_BxLxD.shape[0],), start, jnp.int32)
        z = self(tokens_BxLxD, order_BxL, known_B, class_embed_BxW, slots=known_slots, deterministic=True)
        return jnp.take_along_axis(z, position_BxM[..., None], axis=1), cache

    @nn.nowrap
    def train_flops(self) -> float:
        """FLOPs of the forward pass per image, at the mean number of known tokens."""
        return self.step_flops(self.model.mask_ratio.expected_known(self.num_tokens))

    @nn.nowrap
    def unknown_in_training(self) -> float:
        """The mean number of tokens per image in the loss."""
        return self.num_tokens - self.model.mask_ratio.expected_known(self.num_tokens)

    @nn.nowrap
    def step_flops(self, num_known: float) -> float:
        """FLOPs of the forward pass per image, given `num_known` tokens."""
        width, buffer = self.model.width, self.model.buffer_size
        encoded = buffer + num_known
        return (
            2 * self.token_dim * width * num_known
            + flops.stack_flops(width, self.model.encoder_depth, self.model.mlp_ratio, encoded)
            + 2 * width**2 * encoded
            + flops.stack_flops(width, self.model.decoder_depth, self.model.mlp_ratio, buffer + self.num_tokens)
        )

    @nn.nowrap
    def padded_step_flops(self, known_slots: int) -> float:
        """FLOPs of a step per image in a stage padded to `known_slots`."""
        return self.step_flops(known_slots)
