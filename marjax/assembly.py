"""Builds the parts of a run from a resolved config. Rooms below take plain values instead of configs."""

import dataclasses
import functools
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marjax import sharding
from marjax.config.resolve import frozen, tokenizer_config, tokens_of
from marjax.model_config import ModelConfig
from marjax.models import generator as generator_lib
from marjax.models.check import check
from marjax.models.generator import Generator
from marjax.models.init import abstract_params
from marjax.orders import MaskRatio
from marjax.tokenizers import Tokenizer, TokenShape, open_tokenizer
from marjax.training.optimizer import OptimizerConfig, make_optimizer
from marjax.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True, eq=False)
class Assembly:
    """The parts of a run; expensive ones and those that read files are built on first use.

    Attributes:
      config: resolved.
      mesh: the device mesh.
      tokens: shape of an image's tokens.
      generator: the network.
    """

    config: ConfigDict
    mesh: Mesh
    tokens: TokenShape
    generator: Generator

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with its weights. Raises UserError if they cannot be read or do not fit."""
        return open_tokenizer(tokenizer_config(self.config))

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with its learning rate schedule."""
        return make_optimizer(frozen(self.config.train, OptimizerConfig))

    @functools.cached_property
    def params(self) -> Any:
        """The parameters as ShapeDtypeStructs with shardings."""
        return abstract_params(self.generator, self.mesh, self.config.mesh.replicate_below)

    @functools.cached_property
    def state(self) -> TrainState:
        """The training state as ShapeDtypeStructs with shardings."""
        return abstract_state(self.params, self.optimizer, self.mesh)

    def replace(self, *, config: ConfigDict | None = None, tokenizer: Tokenizer | None = None) -> "Assembly":
        """Replaces the tokenizer, of the same token shape, or the config, with equal values of all fields in use."""
        new = dataclasses.replace(self, config=self.config if config is None else config)
        if (tokenizer := tokenizer or self.__dict__.get("tokenizer")) is not None:
            new.__dict__["tokenizer"] = tokenizer
        return new


def assemble(config: ConfigDict, mesh: Mesh | None = None) -> Assembly:
    """Builds the parts of a run.

    Args:
      config: resolved.
      mesh: by default from `config.mesh`, over all devices.

    Raises:
      UserError: a registered head or backbone violates its contract (`heads/protocol.py`, `models/protocol.py`).
    """
    tokens = tokens_of(config)
    model = model_config(config.model)
    generator = generator_lib.build(
        model,
        num_tokens=tokens.num_tokens,
        token_dim=tokens.token_dim,
        num_classes=config.data.num_classes,
        num_codes=tokens.num_codes,
    )
    if generator_lib.is_registered(model):
        check(generator, model)
    if mesh is None:
        mesh = sharding.near_mesh(config.mesh.fsdp, config.mesh.tensor)
    return Assembly(config, mesh, tokens, generator)


def model_config(model: ConfigDict) -> ModelConfig:
    """Converts a resolved `config.model` to its dataclass."""
    return frozen(model, ModelConfig, mask_ratio=frozen(model.mask_ratio, MaskRatio, per=model.mask_ratio_per))
