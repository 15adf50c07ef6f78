"""The KL autoencoder: latents are samples of a Gaussian posterior.

Legend: B batch, H x W pixels, h x w latents of C channels. `moments`, float32 (B, h, w, 2C), are the encoder's means
and log variances, unscaled and unclipped; they can be cached, since sampling from them is a pure function.
"""

from typing import Any

import jax
import jax.numpy as jnp

from marjax import sharding
from marjax.tokenizers.autoencoder import Autoencoder, rows_at_once
from marjax.tokenizers.spec import POSTERIORS, Spec


class KL:
    """A frozen KL network as a tokenizer (see `protocol.Tokenizer`); encodes and decodes in bounded memory.

    Attributes:
      spec: the network.
      scale: multiplies latents.
      posterior: "sample" or "mean".
    """

    def __init__(
        self,
        spec: Spec,
        params: Any,
        *,
        scale: float,
        dtype: Any = jnp.float32,
        checksum: str = "",
        posterior: str = "sample",
    ) -> None:
        """Raises ValueError for an unknown posterior."""
        if posterior not in POSTERIORS:
            raise ValueError(f"posterior is {posterior!r}; use one of {', '.join(POSTERIORS)}")
        self.posterior = posterior
        self.spec, self.params, self.scale, self.checksum = spec, params, scale, checksum
        self.network = Autoencoder(spec, jnp.dtype(dtype))

    def moments(self, params: Any, image: jax.Array) -> jax.Array:
        """Moments of images, float (B, H, W, in_channels) in [-1, 1]. Raises UserError for wrong shapes."""

        def rows(part: jax.Array) -> jax.Array:
            return self.network.apply({"params": params}, part, method="encode")  # type: ignore[return-value]

        return sharding.map_rows(rows, image, rows_at_once(self.spec, image.shape[1] * image.shape[2]))

    def encode(self, params: Any, image: jax.Array, key: jax.Array) -> jax.Array:
        """Scaled latents, float32 (B, h, w, C), from the posterior. Raises UserError as `moments` does."""
        return self.latents(params, self.moments(params, image), key)

    def latents(self, params: Any, moments: jax.Array, key: jax.Array) -> jax.Array:
        """Scaled latents, float32 (B, h, w, C), from moments."""
        return (mean(moments) if self.posterior == "mean" else sample(moments, key)) * self.scale

    def decode(self, params: Any, latent: jax.Array) -> jax.Array:
        """Images, float32 (B, H, W, in_channels), not clipped, from scaled latents (B, h, w, C)."""

        def rows(part: jax.Array) -> jax.Array:
            return self.network.apply({"params": params}, part / self.scale, method="decode")  # type: ignore[return-value]

        pixels = latent.shape[1] * latent.shape[2] * self.spec.stride**2
        return sharding.map_rows(rows, latent, rows_at_once(self.spec, pixels))

    def codebook(self, params: Any) -> None:
        """None: latents are continuous."""


def split(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance, float32 (B, h, w, C) each, the latter clipped to [-30, 20]."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def mean(moments: jax.Array) -> jax.Array:
    """The posterior's mean, float32 (B, h, w, C), unscaled."""
    return split(moments)[0]


def sample(moments: jax.Array, key: jax.Array) -> jax.Array:
    """A draw from the posterior, float32 (B, h, w, C), unscaled; row i depends on (moments[i], key, i) alone."""
    return sample_with(moments, draw_noise(key, moments.shape[0], (*moments.shape[1:-1], moments.shape[-1] // 2)))


def sample_with(moments: jax.Array, noise: jax.Array) -> jax.Array:
    """`sample` with given standard normal noise, (B, h, w, C)."""
    centre, logvar = split(moments)
    return centre + jnp.exp(0.5 * logvar) * noise


def draw_noise(key: jax.Array, rows: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise, float32 (rows, *shape); row i depends on (key, i) alone, whatever the devices."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(jnp.arange(rows))
