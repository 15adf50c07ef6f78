"""`config.model` as frozen dataclasses, from which backbones and heads are built."""

import dataclasses

from marjax.orders import MaskRatio


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """`config.model.denoiser`."""

    depth: int
    width: int
    remat: str


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """`config.model.diffusion`."""

    num_steps: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A resolved `config.model`; marjax/config/schema.py documents the fields."""

    variant: str
    head: str
    extra: str
    width: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    mlp_ratio: float
    buffer_size: int
    class_dropout: float
    attn_dropout: float
    proj_dropout: float
    remat: str
    dtype: str
    mask_ratio: MaskRatio
    denoiser: DenoiserConfig
    diffusion: DiffusionConfig
    diffusion_batch_mul: int
