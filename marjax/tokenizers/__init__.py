"""Tokenizers: images to latents and back."""

from marjax.errors import UserError
from marjax.tokenizers.pixels import Pixels
from marjax.tokenizers.protocol import Tokenizer, TokenShape

__all__ = ["TokenShape", "Tokenizer", "open_tokenizer", "token_shape"]

# Stride and latent channels; None: as many as the image has.
_GRIDS: dict[str, tuple[int, int | None]] = {"pixels": (1, None), "kl16": (16, 16)}


def token_shape(name: str, *, image_size: int, channels: int, patch_size: int) -> TokenShape:
    """The tokens of a square image under the named tokenizer.

    Raises:
      UserError: no such tokenizer, or an image size that it does not divide.
    """
    if name not in _GRIDS:
        raise UserError(f"tokenizer.name is {name!r}: give one of {', '.join(sorted(_GRIDS))}")
    stride, latent_channels = _GRIDS[name]
    try:
        return TokenShape.of(image_size, stride, latent_channels or channels, patch_size)
    except ValueError as error:
        raise UserError(f"data.image_size: {error}") from None


def open_tokenizer(name: str) -> Tokenizer:
    """The named tokenizer with its weights.

    Raises:
      UserError: there is none, or it cannot be run.
    """
    if name == "pixels":
        return Pixels()
    raise UserError(f"tokenizer {name!r} has a known token shape (so its models can be built, traced and benchmarked) "
                    f"but its autoencoder is not part of this version: train with --config.tokenizer.name=pixels")
