"""The network: class embedding, backbone and head, for training and generation.

Shapes: B batch, L tokens, D token dimension, W backbone width, M tokens predicted in one step, V codebook size.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax import orders
from marjax.errors import UserError
from marjax.heads.categorical import CategoricalHead
from marjax.heads.diffusion import DiffusionHead
from marjax.heads.protocol import Head, Terms
from marjax.heads.regression import RegressionHead
from marjax.model_config import ModelConfig
from marjax.models.decoder_only import DecoderOnly
from marjax.models.encoder_decoder import EncoderDecoder
from marjax.models.protocol import Backbone
from marjax.nn.layers import embedding_init, lookup, parameter, vector_init
from marjax.ranges import shown
from marjax.registry import Choices
from marjax.trees import PyTree
from marjax.variants import VARIANTS

BACKBONES: Choices[type[Backbone]] = Choices(
    "backbone", {"bidirectional": EncoderDecoder, "causal": DecoderOnly}, lambda name, found: found
)
HEADS: Choices[type[Head]] = Choices(
    "head",
    {"diffusion": DiffusionHead, "categorical": CategoricalHead, "regression": RegressionHead},
    lambda name, found: found,
)


class LossRandomness(NamedTuple):
    """The randomness of the loss of a batch, except for dropout. Every leaf has the batch axis first.

    `order` int32 (B, L); `num_known` int32 (B,); `drop_label` bool (B,), true for the null class; `head`, from
    `Head.draw_loss_noise`.
    """

    order: jax.Array
    num_known: jax.Array
    drop_label: jax.Array
    head: PyTree


class Classes(NamedTuple):
    """Classes of a batch: `label` int32 (B,) in [0, num_classes); `drop` bool (B,), true for the null class."""

    label: jax.Array
    drop: jax.Array


class PlanStep(NamedTuple):
    """One row of a generation plan, scalars.

    `start` int32, the number of known tokens; `num_predicted` int32; `cfg_scale` float32, None for no cfg; `choice`
    float32, the choice temperature of an order by confidence, None for the given order.
    """

    start: jax.Array
    num_predicted: jax.Array
    cfg_scale: jax.Array | None = None
    choice: jax.Array | None = None


class GenerationState(NamedTuple):
    """A partially generated batch.

    `tokens` float32 (B, L, D), in raster order; `order` int32 (B, L), positions in the order of generation; `cache`,
    see `Backbone.init_cache`.
    """

    tokens: jax.Array
    order: jax.Array
    cache: PyTree


class Generator(nn.Module):
    """Models images as sequences of tokens, given a class or the null class."""

    num_classes: int
    num_tokens: int
    token_dim: int
    width: int
    class_dropout: float
    order: str  # a key of orders.ORDERS
    backbone: Backbone
    head: Head
    num_codes: int = 0  # codebook size; 0: continuous tokens

    def setup(self) -> None:
        self.class_embedding = parameter(self, "class_embedding", embedding_init, (self.num_classes, self.width))
        self.null_embedding = parameter(self, "null_embedding", vector_init, (self.width,))

    @nn.nowrap
    def draw_orders(self, key: jax.Array, batch: int) -> jax.Array:
        """Draws a generation order per image: int32 (B, L)."""
        return orders.ORDERS[self.order](key, batch, self.num_tokens)

    @nn.nowrap
    def draw_loss_randomness(self, key: jax.Array, batch: int) -> LossRandomness:
        """Draws the randomness of the loss for a global batch."""
        key_order, key_known, key_drop, key_head = jax.random.split(key, 4)
        return LossRandomness(
            order=self.draw_orders(key_order, batch),
            num_known=self.backbone.draw_num_known(key_known, batch),
            drop_label=jax.random.bernoulli(key_drop, self.class_dropout, (batch,)),
            head=self.head.draw_loss_noise(key_head, batch, self.num_tokens),
        )

    @nn.nowrap
    def with_codebook(self, codebook: jax.Array | None) -> "Generator":
        """Sets the head's `codebook`, float32 (V, D), if it has that field."""
        return self if codebook is None else self._with_head(codebook=codebook)

    @nn.nowrap
    def with_batch_shards(self, shards: int) -> "Generator":
        """Sets the head's `batch_shards`, if it has that field."""
        return self._with_head(batch_shards=shards)

    @nn.nowrap
    def _with_head(self, **values: Any) -> "Generator":
        head: Any = self.head
        known = {field.name for field in dataclasses.fields(head)}
        values = {name: value for name, value in values.items() if name in known}
        return self.clone(head=head.clone(**values)) if values else self

    def __call__(
        self, tokens_BxLxD: jax.Array, labels_B: jax.Array, rand: LossRandomness, deterministic: bool = False
    ) -> Terms:
        """Per-token terms of the loss, name -> (values, weights); see `Head.__call__`.

        Args:
          tokens_BxLxD: float32, in raster order.
          labels_B: int in [0, num_classes).
          rand: from `draw_loss_randomness`.
          deterministic: disables dropout, which otherwise needs the rng "dropout".
        """
        classes = Classes(labels_B, rand.drop_label)
        z_BxLxW = self.backbone_output(tokens_BxLxD, classes, rand.order, rand.num_known, deterministic=deterministic)
        unknown_BxL = (orders.ranks(rand.order) >= rand.num_known[:, None]).astype(jnp.float32)
        return self.head(z_BxLxW, tokens_BxLxD, rand.head, unknown_BxL)

    def backbone_output(
        self,
        tokens_BxLxD: jax.Array,
        classes: Classes,
        order_BxL: jax.Array,
        num_known_B: jax.Array,
        *,
        slots: int | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Computes z for every position, (B, L, W); see `Backbone.__call__`."""
        return self.backbone(
            tokens_BxLxD, order_BxL, num_known_B, self._class_embed(classes), slots=slots, deterministic=deterministic
        )

    def _class_embed(self, classes: Classes) -> jax.Array:
        return jnp.where(classes.drop[:, None], self.null_embedding, lookup(self.class_embedding, classes.label))

    @nn.nowrap
    def init_generation(self, order_BxL: jax.Array, use_cfg: bool) -> GenerationState:
        """The state before the first step. With cfg, unconditional rows are the second half of batch and cache."""
        batch = order_BxL.shape[0]
        tokens = jnp.zeros((batch, self.num_tokens, self.token_dim), jnp.float32)
        return GenerationState(tokens, order_BxL, self.backbone.init_cache(2 * batch if use_cfg else batch))

    def generate_step(
        self,
        state: GenerationState,
        classes: Classes,
        step: PlanStep,
        noise: PyTree,
        *,
        known_slots: int,
        new_slots: int,
        **settings: Any,
    ) -> GenerationState:
        """Runs one autoregressive step: predicts the tokens at order[start : start + num_predicted].

        Args:
          state: after `step.start` tokens.
          classes: classes of the batch.
          step: row of the plan. With `choice`, the unknown part of the order is first sorted by the head's confidence
            (see `CategoricalHead.sample_ranked`).
          noise: the head's sample noise by position, leading axes (B, L).
          known_slots: static upper bound of `start`.
          new_slots: static upper bound of `num_predicted`; with `choice`, of the number of unknown tokens.
          **settings: keyword arguments of `Head.sample`.
        """
        start, num_predicted, cfg_scale, choice = step
        tokens_BxLxD, order_BxL, cache = state
        padded = jnp.pad(order_BxL, ((0, 0), (0, new_slots)), constant_values=self.num_tokens)
        position_BxM = jax.lax.dynamic_slice_in_dim(padded, start, new_slots, axis=1)
        inside_BxM = jnp.minimum(position_BxM, self.num_tokens - 1)

        rows = (tokens_BxLxD, order_BxL, inside_BxM)
        class_embed = self._class_embed(classes)
        if cfg_scale is not None:
            rows = jax.tree.map(lambda x: jnp.concatenate([x, x]), rows)
            class_embed = jnp.concatenate([class_embed, jnp.broadcast_to(self.null_embedding, class_embed.shape)])
        z_new, cache = self.backbone.step(cache, rows[0], rows[1], start, rows[2], class_embed, known_slots=known_slots)

        def at_positions(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, inside_BxM.reshape(*inside_BxM.shape, *(1,) * (x.ndim - 2)), axis=1)

        noise = jax.tree.map(at_positions, noise)
        if choice is None:
            new_BxMxD = self.head.sample(z_new, noise, cfg_scale, **settings)
        else:
            ranked: Any = self.head  # config.resolve rejects heads without it
            new_BxMxD, confidence_BxM = ranked.sample_ranked(
                z_new, noise, cfg_scale, step=start, choice=choice, **settings
            )
            surest = jnp.argsort(jnp.where(position_BxM < self.num_tokens, -confidence_BxM, jnp.inf), axis=1)
            new_BxMxD = jnp.take_along_axis(new_BxMxD, surest[..., None], axis=1)
            position_BxM = jnp.take_along_axis(position_BxM, surest, axis=1)
            order_BxL = jax.lax.dynamic_update_slice_in_dim(padded, position_BxM, start, axis=1)[:, : self.num_tokens]
        slot_BxL = orders.ranks(order_BxL) - start
        is_new_BxL = (slot_BxL >= 0) & (slot_BxL < num_predicted)
        filled = jnp.take_along_axis(new_BxMxD, jnp.clip(slot_BxL, 0, new_slots - 1)[..., None], axis=1)
        return GenerationState(jnp.where(is_new_BxL[..., None], filled, tokens_BxLxD), order_BxL, cache)


def build(model: ModelConfig, *, num_tokens: int, token_dim: int, num_classes: int, num_codes: int = 0) -> Generator:
    """Builds the network; `num_codes` is the codebook size, 0 for continuous tokens.

    Raises:
      UserError: `model.extra` is invalid for the registered backbone or head.
    """
    variant = VARIANTS[model.variant]
    try:
        backbone = BACKBONES[variant.attention].from_config(model, num_tokens, token_dim)
        head = HEADS[model.head].from_config(model, token_dim, num_codes)
    except UserError as error:
        raise UserError(f"config.model.extra={shown(model.extra)}: {error}") from None
    return Generator(
        num_classes=num_classes,
        num_tokens=num_tokens,
        token_dim=token_dim,
        width=model.width,
        class_dropout=model.class_dropout,
        order=variant.order,
        backbone=backbone,
        head=head,
        num_codes=num_codes,
    )


def is_registered(model: ModelConfig) -> bool:
    """Whether the backbone or the head was added by `marjax.register`."""
    return not (HEADS.is_own(model.head) and BACKBONES.is_own(VARIANTS[model.variant].attention))
