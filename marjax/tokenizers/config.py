"""The values of `config.tokenizer`, for what opens a tokenizer."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The fields of `config.tokenizer.autoencoder`. None: they follow from the tokenizer's name or file."""

    in_channels: int | None
    width: int | None
    channel_mults: tuple[int, ...] | None
    num_res_blocks: int | None
    latent_channels: int | None
    embed_dim: int | None
    encoder_attn_resolutions: tuple[int, ...] | None
    decoder_attn_resolutions: tuple[int, ...] | None
    resolution: int | None
    scale: float | None
    dtype: str


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The fields of `config.tokenizer`, without how it is trained; `config/schema.py` describes them."""

    name: str
    patch_size: int
    path: str
    num_codes: int | None
    checksum: str | None
    posterior: str
    autoencoder: AutoencoderConfig
