"""Tokenizers: images to latents and back."""

import ml_collections

from marjax.errors import UserError
from marjax.tokenizers.codebook import open_codebook
from marjax.tokenizers.pixels import Pixels
from marjax.tokenizers.protocol import Tokenizer, TokenShape

__all__ = ["TokenShape", "Tokenizer", "open_tokenizer", "token_shape"]

# Stride, latent channels (None: as many as the image has), and whether tokens are codes.
_GRIDS: dict[str, tuple[int, int | None, bool]] = {
    "pixels": (1, None, False), "codebook": (1, None, True), "kl16": (16, 16, False)}


def token_shape(name: str, *, image_size: int, channels: int, patch_size: int, num_codes: int = 0) -> TokenShape:
    """The tokens of a square image under the named tokenizer; `num_codes` counts for discrete ones only.

    Raises:
      UserError: no such tokenizer, an image size that it does not divide, or a discrete one without codes.
    """
    if name not in _GRIDS:
        raise UserError(f"tokenizer.name is {name!r}: give one of {', '.join(sorted(_GRIDS))}")
    stride, latent_channels, discrete = _GRIDS[name]
    if discrete and num_codes < 1:
        raise UserError(f"tokenizer.num_codes is {num_codes}: give at least 1")
    try:
        return TokenShape.of(image_size, stride, latent_channels or channels, patch_size, num_codes * discrete)
    except ValueError as error:
        raise UserError(f"data.image_size: {error}") from None


def open_tokenizer(tokenizer: ml_collections.ConfigDict) -> Tokenizer:
    """The tokenizer of a `config.tokenizer`, with its weights.

    Raises:
      UserError: it cannot be run.
    """
    name = tokenizer.name
    if name == "pixels":
        return Pixels()
    if name == "codebook":
        return open_codebook(tokenizer)
    raise UserError(f"tokenizer {name!r} has a known token shape (so its models can be built, traced and benchmarked) "
                    f"but its autoencoder is not part of this version: train with --config.tokenizer.name=pixels")
