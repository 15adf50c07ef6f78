"""Pixels as latents: no tokenizer at all, for small images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a config, which needs these, does without JAX
    import jax


class Pixels:
    """The identity tokenizer: latents are the image, stride 1. Has no weights (`params` is empty)."""

    def __init__(self) -> None:
        self.params: Any = {}
        self.checksum = ""
        self.scale = 1.0

    def encode(self, params: Any, image: "jax.Array", key: "jax.Array") -> "jax.Array":
        """The image itself, float (B, H, W, C) in [-1, 1]."""
        del params, key
        return image

    def decode(self, params: Any, latent: "jax.Array") -> "jax.Array":
        """The latent itself, (B, H, W, C)."""
        del params
        return latent

    def codebook(self, params: Any) -> None:
        """None: pixels are continuous."""
        del params
