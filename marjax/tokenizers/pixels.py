"""Pixels as latents: no tokenizer at all, for small images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a config, which needs these, does without JAX
    import jax


class Pixels:
    """Latents are the image times `scale`, stride 1. Has no weights (`params` is empty).

    A scale below 1 lets the diffusion head decide on a patch's mean colour over more of its chain: all values of a
    patch share it, so that unscaled it is only hidden by the strongest noise (Chen 2023, arXiv 2301.10972).
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.params: Any = {}
        self.checksum = ""
        self.scale = scale

    def encode(self, params: Any, image: "jax.Array", key: "jax.Array") -> "jax.Array":
        """The scaled image, float (B, H, W, C), of one in [-1, 1]."""
        return image * self.scale

    def decode(self, params: Any, latent: "jax.Array") -> "jax.Array":
        """The image of a scaled latent, (B, H, W, C)."""
        return latent / self.scale

    def codebook(self, params: Any) -> None:
        """None: pixels are continuous."""
