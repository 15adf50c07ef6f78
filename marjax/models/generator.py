"""The whole network: class embedding, backbone and head, in training and in generation.

Shapes: B batch, L tokens, D token dimension, W backbone width, M tokens of one generation step.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from marjax import orders
from marjax.models.diffusion_head import DiffusionHead
from marjax.models.layers import lookup, normal_002
from marjax.models.masked import MaskedBackbone


class LossRandomness(NamedTuple):
    """Everything random about the loss of a batch, apart from dropout. Every leaf has the batch axis first.

    `order` int32 (B, L); `num_known` int32 (B,); `drop_label` bool (B,), true where the null class is shown; `head`,
    what the head draws.
    """

    order: jax.Array
    num_known: jax.Array
    drop_label: jax.Array
    head: Any


class Generator(nn.Module):
    """Models images as sets of tokens given a class label, or none."""

    num_classes: int
    num_tokens: int
    token_dim: int
    width: int
    class_dropout: float
    mask_ratio: orders.MaskRatio
    backbone: MaskedBackbone
    head: DiffusionHead

    def setup(self) -> None:
        partitioned = nn.with_logical_partitioning
        self.class_embedding: Any = self.param("class_embedding", partitioned(normal_002, (None, "embed")),
                                               (self.num_classes, self.width), jnp.float32)
        self.null_embedding: Any = self.param("null_embedding", partitioned(normal_002, ("embed",)),
                                              (self.width,), jnp.float32)

    @property
    def training_slots(self) -> int:
        return orders.max_visible(self.num_tokens, self.mask_ratio.minimum)

    @nn.nowrap
    def draw_loss_randomness(self, key: jax.Array, batch: int) -> LossRandomness:
        """Draws the randomness of the loss for a global batch from one key."""
        key_order, key_ratio, key_drop, key_head = jax.random.split(key, 4)
        return LossRandomness(
            order=orders.draw_orders(key_order, batch, self.num_tokens),
            num_known=self.mask_ratio.draw_num_known(key_ratio, batch, self.num_tokens),
            drop_label=jax.random.bernoulli(key_drop, self.class_dropout, (batch,)),
            head=self.head.draw_loss_noise(key_head, batch, self.num_tokens))

    def __call__(self, tokens_BxLxD: jax.Array, labels_B: jax.Array, rand: LossRandomness,
                 deterministic: bool = False) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The head's per-token terms, name -> (values, weights); see its `__call__`.

        Args:
          tokens_BxLxD: float32, in raster order.
          labels_B: int in [0, num_classes).
          rand: from `draw_loss_randomness`.
          deterministic: no dropout; otherwise the rng "dropout" is needed.
        """
        z_BxLxW = self.condition(tokens_BxLxD, labels_B, rand.drop_label, rand.order, rand.num_known,
                                 slots=self.training_slots, deterministic=deterministic)
        unknown_BxL = (orders.ranks(rand.order) >= rand.num_known[:, None]).astype(jnp.float32)
        return self.head(z_BxLxW, tokens_BxLxD, rand.head, unknown_BxL)

    def condition(self, tokens_BxLxD: jax.Array, labels_B: jax.Array, drop_label_B: jax.Array, order_BxL: jax.Array,
                  num_known_B: jax.Array, *, slots: int, deterministic: bool = True) -> jax.Array:
        """z of every position, (B, L, W)."""
        class_BxW = jnp.where(drop_label_B[:, None], self.null_embedding, lookup(self.class_embedding, labels_B))
        return self.backbone(tokens_BxLxD, order_BxL, num_known_B, class_BxW, slots=slots,
                             deterministic=deterministic)

    def generate_step(self, tokens_BxLxD: jax.Array, labels_B: jax.Array, drop_label_B: jax.Array,
                      order_BxL: jax.Array, start: jax.Array, num_predicted: jax.Array, noise: Any,
                      guidance: jax.Array | None, *, known_slots: int, new_slots: int, **settings: Any) -> jax.Array:
        """One autoregressive step: the tokens with positions order[start : start + num_predicted] filled in.

        Args:
          tokens_BxLxD: float32; entries not yet generated do not matter.
          labels_B: int in [0, num_classes).
          drop_label_B: bool, true where no class is asked for.
          order_BxL: int32.
          start, num_predicted: int scalars, at most `known_slots` and `new_slots`.
          noise: the head's sample noise, leading axes (B, L), by position.
          guidance: the scale, or None for none; the unconditional rows then share the batch.
          known_slots, new_slots: static sizes of the padded step.
          **settings: the head's own (see its `sample`).
        """
        batch = tokens_BxLxD.shape[0]
        known_B = jnp.full((batch,), start, jnp.int32)
        rows = (tokens_BxLxD, labels_B, drop_label_B, order_BxL, known_B)
        if guidance is not None:
            rows = jax.tree.map(lambda x: jnp.concatenate([x, x]), rows)
            rows = (*rows[:2], jnp.concatenate([drop_label_B, jnp.ones_like(drop_label_B)]), *rows[3:])
        z = self.condition(*rows, slots=known_slots)

        padded = jnp.pad(order_BxL, ((0, 0), (0, new_slots)), constant_values=self.num_tokens)
        position_BxM = jax.lax.dynamic_slice_in_dim(padded, start, new_slots, axis=1)
        position_BxM = jnp.minimum(position_BxM, self.num_tokens - 1)
        z_positions = position_BxM if guidance is None else jnp.concatenate([position_BxM, position_BxM])
        z_new = jnp.take_along_axis(z, z_positions[..., None], axis=1)

        def at_positions(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, position_BxM.reshape(*position_BxM.shape, *(1,) * (x.ndim - 2)), axis=1)

        new_BxMxD = self.head.sample(z_new, jax.tree.map(at_positions, noise), guidance, **settings)
        slot_BxL = orders.ranks(order_BxL) - start
        is_new_BxL = (slot_BxL >= 0) & (slot_BxL < num_predicted)
        filled = jnp.take_along_axis(new_BxMxD, jnp.clip(slot_BxL, 0, new_slots - 1)[..., None], axis=1)
        return jnp.where(is_new_BxL[..., None], filled, tokens_BxLxD)


def build(model: ml_collections.ConfigDict, *, num_tokens: int, token_dim: int, num_classes: int) -> Generator:
    """The network that a resolved `config.model` describes (see `marjax/config.py`)."""
    dtype = jnp.dtype(model.dtype)
    backbone = MaskedBackbone(
        num_tokens=num_tokens, token_dim=token_dim, width=model.width, encoder_depth=model.encoder_depth,
        decoder_depth=model.decoder_depth, num_heads=model.num_heads, mlp_ratio=model.mlp_ratio,
        buffer_size=model.buffer_size, attn_dropout=model.attn_dropout, proj_dropout=model.proj_dropout,
        remat=model.remat, dtype=dtype)
    head = DiffusionHead(
        token_dim=token_dim, depth=model.denoiser.depth, width=model.denoiser.width, cond_width=model.width,
        num_steps=model.diffusion.num_steps, batch_mul=model.diffusion.batch_mul, remat=model.denoiser.remat,
        dtype=dtype)
    ratio = model.mask_ratio
    return Generator(
        num_classes=num_classes, num_tokens=num_tokens, token_dim=token_dim, width=model.width,
        class_dropout=model.class_dropout, backbone=backbone, head=head,
        mask_ratio=orders.MaskRatio(ratio.mean, ratio.std, ratio.minimum, model.mask_ratio_per))
