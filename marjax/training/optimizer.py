"""AdamW as the reference runs it: which parameters decay, and the learning rate by step."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marjax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's part of a resolved `config.train`; marjax/config/schema.py says what each field means."""

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
    """Learning rate by step: linear from 0 over the warmup, then constant, or half a cosine to `min_lr` at the end."""
    peak, low, warmup, steps = train.lr, train.min_lr, train.warmup_steps, train.steps

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = jnp.asarray(peak, jnp.float32)
        if train.schedule == "cosine":
            # (1 + cos(pi p)) / 2, written so that float32 keeps its digits near the end, where it vanishes.
            left = jnp.clip((steps - step) / max(1, steps - warmup), 0.0, 1.0)
            after = low + (peak - low) * jnp.square(jnp.sin(0.5 * math.pi * left))
        return jnp.where(step < warmup, peak * step / max(1, warmup), after)

    return schedule


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: not on biases, norm scales (the reference's 1-D tensors) or the denoiser.

    The reference stores its embeddings with leading axes of length 1, so they count as more than 1-D and decay.
    """

    def decays(path: Any, leaf: Any) -> bool:
        names = [str(entry.key) for entry in path]
        return names[-1] not in ("bias", "scale") and "denoiser" not in names

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(train: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW."""
    return optax.chain(
        clipping(train.clip),
        optax.adamw(
            learning_rate(train), train.b1, train.b2, eps=1e-8, weight_decay=train.weight_decay, mask=decay_mask
        ),
    )


def clipping(norm: float | None) -> optax.GradientTransformation:
    """Clipping of the gradient by its global norm; None or 0 is no clipping. The state has the same structure."""
    return optax.clip_by_global_norm(norm) if norm else optax.identity()
