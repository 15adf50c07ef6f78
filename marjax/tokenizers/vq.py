"""The VQ autoencoder: every latent is one of K codes, or the encoder output before quantization.

Legend: B batch, H x W pixels, h x w latents, K codes of D values (`embed_dim`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from marjax import sharding
from marjax.tokenizers.autoencoder import Autoencoder, rows_at_once
from marjax.tokenizers.nearest_code import nearest
from marjax.tokenizers.spec import Spec


class VQ:
    """A frozen VQ network as a tokenizer (see `protocol.Tokenizer`); encodes and decodes in bounded memory.

    With `discrete`, latents are codes, for the categorical head. Without, they are scaled latents before quantization,
    which `decode` quantizes, for the diffusion head (Li et al. 2024, table 2).

    Attributes:
      spec: the network.
      scale: multiplies continuous latents; 1 for codes.
    """

    def __init__(
        self,
        spec: Spec,
        params: Any,
        *,
        discrete: bool,
        scale: float = 1.0,
        dtype: Any = jnp.float32,
        checksum: str = "",
    ) -> None:
        """Raises ValueError: codes with a scale."""
        if discrete and scale != 1.0:
            raise ValueError(f"scale is {scale}, but codes are not scaled; use 1")
        self.spec, self.params, self.scale, self.checksum, self.discrete = spec, params, scale, checksum, discrete
        self.network = Autoencoder(spec, jnp.dtype(dtype))

    def codes(self, params: Any, image: jax.Array) -> jax.Array:
        """Code indices, int32 (B, h, w), of images, float (B, H, W, in_channels) in [-1, 1]."""
        return self._encode(params, image, lambda latent: nearest(latent, params["codebook"]))

    def moments(self, params: Any, image: jax.Array) -> jax.Array:
        """Code indices, int32 (B, h, w), if `discrete`, else unscaled latents, float32 (B, h, w, D)."""
        return self.codes(params, image) if self.discrete else self._encode(params, image, lambda latent: latent)

    def encode(self, params: Any, image: jax.Array, key: jax.Array) -> jax.Array:
        """Latents, float32 (B, h, w, D), of images, float (B, H, W, in_channels) in [-1, 1]. Deterministic.

        Raises UserError for images of the wrong shape.
        """
        return self.latents(params, self.moments(params, image), key)

    def latents(self, params: Any, moments: jax.Array, key: jax.Array) -> jax.Array:
        """Latents, float32 (B, h, w, D), from moments."""
        return jnp.asarray(params["codebook"])[moments] if self.discrete else moments.astype(jnp.float32) * self.scale

    def _encode(self, params: Any, image: jax.Array, then: Any) -> jax.Array:
        def rows(part: jax.Array) -> jax.Array:
            return then(self.network.apply({"params": params}, part, method="encode"))

        return sharding.map_rows(rows, image, rows_at_once(self.spec, image.shape[1] * image.shape[2]))

    def decode(self, params: Any, latent: jax.Array) -> jax.Array:
        """Images, float32 (B, H, W, in_channels), not clipped, from latents (B, h, w, D) as `encode` gives them."""

        def rows(part: jax.Array) -> jax.Array:
            codes = part if self.discrete else _quantise(params, part / self.scale)
            return self.network.apply({"params": params}, codes, method="decode")  # type: ignore[return-value]

        pixels = latent.shape[1] * latent.shape[2] * self.spec.stride**2
        return sharding.map_rows(rows, latent, rows_at_once(self.spec, pixels))

    def codebook(self, params: Any) -> jax.Array | None:
        """The codes, float32 (K, D), if `discrete`."""
        return jnp.asarray(params["codebook"]) if self.discrete else None


def _quantise(params: Any, latent: jax.Array) -> jax.Array:
    codebook = jnp.asarray(params["codebook"])
    return codebook[nearest(latent, codebook)]
