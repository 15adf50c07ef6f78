"""Small generators and their parameters."""

from typing import Any

import jax

from marjax import config as config_lib
from marjax.assembly import model_config
from marjax.models import generator as generator_lib
from marjax.models.init import init_unboxed
from marjax.variants import HEADS


def make_generator(num_codes: int = 24, **overrides: Any) -> generator_lib.Generator:
    """A small network on 16 tokens of 4 values with 5 classes; `variant="ar"` sets config.model.variant."""
    config = config_lib.base()
    config.model.update(width=32, encoder_depth=2, decoder_depth=2, num_heads=4, buffer_size=3, dtype="float32")
    config.model.denoiser.update(depth=2, width=32)
    config = config_lib.apply_overrides(config, {f"model.{key}": value for key, value in overrides.items()})
    return generator_lib.build(
        model_config(config.model),
        num_tokens=16,
        token_dim=4,
        num_classes=5,
        num_codes=num_codes if HEADS[config.model.head].discrete else 0,
    )


def perturbed_params(generator: generator_lib.Generator, seed: int = 0) -> Any:
    """Parameters away from their start: layers that begin at zero would hide what depends on what."""
    params = jax.jit(lambda key: init_unboxed(generator, key))(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)
