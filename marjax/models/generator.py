"""The whole network: class embedding, backbone and head, in training and in generation.

Shapes: B batch, L tokens, D token dimension, W backbone width, M tokens of one generation step.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from marjax import orders
from marjax.errors import UserError
from marjax.heads.categorical import CategoricalHead
from marjax.heads.diffusion import DiffusionHead
from marjax.heads.regression import RegressionHead
from marjax.models.contracts import Backbone, Head, check
from marjax.models.decoder_only import CausalBackbone
from marjax.models.encoder_decoder import MaskedBackbone
from marjax.nn.layers import embedding_init, lookup, normal_002
from marjax.ranges import shown
from marjax.registry import Choices
from marjax.variants import VARIANTS

BACKBONES: Choices[type[Backbone]] = Choices(
    "backbone", {"bidirectional": MaskedBackbone, "causal": CausalBackbone}, lambda name, found: found
)
HEADS: Choices[type[Head]] = Choices(
    "head",
    {"diffusion": DiffusionHead, "categorical": CategoricalHead, "regression": RegressionHead},
    lambda name, found: found,
)


class LossRandomness(NamedTuple):
    """Everything random about the loss of a batch, apart from dropout. Every leaf has the batch axis first.

    `order` int32 (B, L); `num_known` int32 (B,); `drop_label` bool (B,), true where the null class is shown; `head`,
    what the head draws.
    """

    order: jax.Array
    num_known: jax.Array
    drop_label: jax.Array
    head: Any


class Progress(NamedTuple):
    """Where the generation of a batch stands.

    `tokens` float32 (B, L, D), in raster order; `order` int32 (B, L), of which the steps done are a prefix; `cache`,
    what the backbone keeps from step to step.
    """

    tokens: jax.Array
    order: jax.Array
    cache: Any


class Generator(nn.Module):
    """Models images as sequences of tokens given a class label, or none."""

    num_classes: int
    num_tokens: int
    token_dim: int
    width: int
    class_dropout: float
    order: str  # a key of orders.ORDERS
    backbone: Backbone
    head: Head
    num_codes: int = 0  # how many different tokens there are; 0: continuous

    def setup(self) -> None:
        self.class_embedding: Any = self.param(
            "class_embedding", embedding_init, (self.num_classes, self.width), jnp.float32
        )
        self.null_embedding: Any = self.param(
            "null_embedding", nn.with_logical_partitioning(normal_002, ("embed",)), (self.width,), jnp.float32
        )

    @nn.nowrap
    def draw_orders(self, key: jax.Array, batch: int) -> jax.Array:
        """In which order the tokens of each image are generated: int32 (B, L)."""
        return orders.ORDERS[self.order](key, batch, self.num_tokens)

    @nn.nowrap
    def draw_loss_randomness(self, key: jax.Array, batch: int) -> LossRandomness:
        """Draws the randomness of the loss for a global batch from one key."""
        key_order, key_known, key_drop, key_head = jax.random.split(key, 4)
        return LossRandomness(
            order=self.draw_orders(key_order, batch),
            num_known=self.backbone.draw_num_known(key_known, batch),
            drop_label=jax.random.bernoulli(key_drop, self.class_dropout, (batch,)),
            head=self.head.draw_loss_noise(key_head, batch, self.num_tokens),
        )

    def __call__(
        self,
        tokens_BxLxD: jax.Array,
        labels_B: jax.Array,
        rand: LossRandomness,
        deterministic: bool = False,
        codebook: jax.Array | None = None,
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The head's per-token terms, name -> (values, weights); see its `__call__`.

        Args:
          tokens_BxLxD: float32, in raster order.
          labels_B: int in [0, num_classes).
          rand: from `draw_loss_randomness`.
          deterministic: no dropout; otherwise the rng "dropout" is needed.
          codebook: of a discrete tokenizer, float32 (K, D); tokens are then among its rows.
        """
        z_BxLxW = self.backbone_output(
            tokens_BxLxD, labels_B, rand.drop_label, rand.order, rand.num_known, deterministic=deterministic
        )
        unknown_BxL = (orders.ranks(rand.order) >= rand.num_known[:, None]).astype(jnp.float32)
        return self.head(z_BxLxW, tokens_BxLxD, rand.head, unknown_BxL, codebook)

    def backbone_output(
        self,
        tokens_BxLxD: jax.Array,
        labels_B: jax.Array,
        drop_label_B: jax.Array,
        order_BxL: jax.Array,
        num_known_B: jax.Array,
        *,
        slots: int | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """z of every position, (B, L, W); for the arguments see the backbone's `__call__`."""
        return self.backbone(
            tokens_BxLxD,
            order_BxL,
            num_known_B,
            self._class_embed(labels_B, drop_label_B),
            slots=slots,
            deterministic=deterministic,
        )

    def _class_embed(self, labels_B: jax.Array, drop_label_B: jax.Array) -> jax.Array:
        return jnp.where(drop_label_B[:, None], self.null_embedding, lookup(self.class_embedding, labels_B))

    @nn.nowrap
    def begin(self, order_BxL: jax.Array, guided: bool) -> Progress:
        """Nothing generated yet. Under guidance the unconditional rows share the batch, and so the cache."""
        batch = order_BxL.shape[0]
        tokens = jnp.zeros((batch, self.num_tokens, self.token_dim), jnp.float32)
        return Progress(tokens, order_BxL, self.backbone.init_cache(2 * batch if guided else batch))

    def generate_step(
        self,
        progress: Progress,
        labels_B: jax.Array,
        drop_label_B: jax.Array,
        start: jax.Array,
        num_predicted: jax.Array,
        noise: Any,
        guidance: jax.Array | None,
        choice: jax.Array | None = None,
        *,
        known_slots: int,
        new_slots: int,
        **settings: Any,
    ) -> Progress:
        """One autoregressive step: the tokens at order[start : start + num_predicted] filled in.

        Args:
          progress: after `start` tokens.
          labels_B: int in [0, num_classes).
          drop_label_B: bool, true where no class is asked for.
          start, num_predicted: int scalars, at most `known_slots` and `new_slots`.
          noise: the head's sample noise, leading axes (B, L), by position.
          guidance: the scale, or None for none.
          choice: None to follow the order. Otherwise what is left of the order is rearranged by the head's confidence
            first (see `sample_ranked` of a head that has it); `new_slots` must then hold all unknown tokens.
          known_slots, new_slots: static sizes of the padded step.
          **settings: the head's own (see its `sample`).
        """
        tokens_BxLxD, order_BxL, cache = progress
        padded = jnp.pad(order_BxL, ((0, 0), (0, new_slots)), constant_values=self.num_tokens)
        position_BxM = jax.lax.dynamic_slice_in_dim(padded, start, new_slots, axis=1)
        inside_BxM = jnp.minimum(position_BxM, self.num_tokens - 1)

        rows = (tokens_BxLxD, order_BxL, inside_BxM)
        class_embed = self._class_embed(labels_B, drop_label_B)
        if guidance is not None:
            rows = jax.tree.map(lambda x: jnp.concatenate([x, x]), rows)
            class_embed = jnp.concatenate([class_embed, jnp.broadcast_to(self.null_embedding, class_embed.shape)])
        z_new, cache = self.backbone.step(cache, rows[0], rows[1], start, rows[2], class_embed, known_slots=known_slots)

        def at_positions(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, inside_BxM.reshape(*inside_BxM.shape, *(1,) * (x.ndim - 2)), axis=1)

        noise = jax.tree.map(at_positions, noise)
        if choice is None:
            new_BxMxD = self.head.sample(z_new, noise, guidance, **settings)
        else:
            ranked: Any = self.head  # `config.resolve` lets only heads that rank come here
            new_BxMxD, confidence_BxM = ranked.sample_ranked(
                z_new, noise, guidance, step=start, choice=choice, **settings
            )
            surest = jnp.argsort(jnp.where(position_BxM < self.num_tokens, -confidence_BxM, jnp.inf), axis=1)
            new_BxMxD = jnp.take_along_axis(new_BxMxD, surest[..., None], axis=1)
            position_BxM = jnp.take_along_axis(position_BxM, surest, axis=1)
            order_BxL = jax.lax.dynamic_update_slice_in_dim(padded, position_BxM, start, axis=1)[:, : self.num_tokens]
        slot_BxL = orders.ranks(order_BxL) - start
        is_new_BxL = (slot_BxL >= 0) & (slot_BxL < num_predicted)
        filled = jnp.take_along_axis(new_BxMxD, jnp.clip(slot_BxL, 0, new_slots - 1)[..., None], axis=1)
        return Progress(jnp.where(is_new_BxL[..., None], filled, tokens_BxLxD), order_BxL, cache)


def build(
    model: ml_collections.ConfigDict, *, num_tokens: int, token_dim: int, num_classes: int, num_codes: int = 0
) -> Generator:
    """The network that a resolved `config.model` describes (see `marjax/config/schema.py`).

    `num_codes` is how many different tokens there are, for heads that model codes.
    """
    variant = VARIANTS[model.variant]
    try:
        backbone = BACKBONES[variant.attention].from_config(model, num_tokens, token_dim)
        head = HEADS[model.head].from_config(model, token_dim, num_codes)
    except UserError as error:  # of a registered one, which parses its own settings
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


def from_config(config: ml_collections.ConfigDict, tokens: Any) -> Generator:
    """The network of a whole resolved config, for tokens of that `TokenShape`.

    Raises:
      UserError: a registered head or backbone that does not keep its contract (`models/contracts.py`).
    """
    made = build(
        config.model,
        num_tokens=tokens.num_tokens,
        token_dim=tokens.token_dim,
        num_classes=config.data.num_classes,
        num_codes=tokens.num_codes,
    )
    if not (HEADS.is_own(config.model.head) and BACKBONES.is_own(VARIANTS[config.model.variant].attention)):
        check(made, config.model)
    return made
