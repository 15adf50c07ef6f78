"""AdamW as in the reference: learning rate schedule, weight decay mask and clipping."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marjax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's part of a resolved `config.train`; marjax/config/schema.py documents the fields."""

    steps: int
    lr: float
    schedule: str
    min_lr: float
    warmup_steps: int
    b1: float
    b2: float
    weight_decay: float
    clip: float | None


def learning_rate(train: OptimizerConfig) -> optax.Schedule:
    """Linear warmup from 0, then a constant learning rate or a half cosine to `min_lr`."""
    peak, low, warmup, steps = train.lr, train.min_lr, train.warmup_steps, train.steps

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = jnp.asarray(peak, jnp.float32)
        if train.schedule == "cosine":
            # (1 + cos(pi p)) / 2, written to keep float32 precision near 0.
            left = jnp.clip((steps - step) / max(1, steps - warmup), 0.0, 1.0)
            after = low + (peak - low) * jnp.square(jnp.sin(0.5 * math.pi * left))
        return jnp.where(step < warmup, peak * step / max(1, warmup), after)

    return schedule


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: all parameters but biases, norm scales and the denoiser.

    As in the reference, embeddings decay: it exempts 1-D tensors, and its embeddings have leading axes of length 1.
    """

    def decays(path: Any, leaf: Any) -> bool:
        names = [str(entry.key) for entry in path]
        return names[-1] not in ("bias", "scale") and "denoiser" not in names

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(train: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW."""
    return optax.chain(
        clipping(train.clip),
        optax.adamw(
            learning_rate(train), train.b1, train.b2, eps=1e-8, weight_decay=train.weight_decay, mask=decay_mask
        ),
    )


def clipping(norm: float | None) -> optax.GradientTransformation:
    """Clips by global norm; None or 0 disables it. The structure of the state does not depend on `norm`."""
    return optax.clip_by_global_norm(norm) if norm else optax.identity()
