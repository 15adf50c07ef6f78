"""The patch discriminator for training autoencoders (Isola et al. 2017; Esser et al. 2021, VQGAN).

Legend: B batch, H x W pixels, C channels, P x Q patches.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_GROUPS = 32


class Discriminator(nn.Module):
    """How real each patch of an image looks: float32 (B, P, Q) from float images (B, H, W, C) in [-1, 1].

    4 x 4 convolutions: `layers` with stride 2, then two with stride 1. VQGAN uses BatchNorm; here GroupNorm makes the
    output for an image independent of the other images and of the sharding of the batch.

    Attributes:
      width: channels of the first layer, a multiple of 32; doubled by every next layer, up to 8 times.
      layers: number of layers with stride 2; images need at least 3 * 2**layers pixels per side.
      dtype: of the convolutions.
    """

    width: int = 64
    layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if jnp.dtype(self.dtype) == jnp.float32 else None

        def conv(x: jax.Array, features: int, stride: int, name: str) -> jax.Array:
            return nn.Conv(
                features,
                (4, 4),
                (stride, stride),
                ((1, 1), (1, 1)),
                dtype=self.dtype,
                precision=precision,
                kernel_init=nn.initializers.normal(0.02),
                name=name,
            )(x)

        x = nn.leaky_relu(conv(image, self.width, 2, "conv_in"), 0.2)
        for layer in range(1, self.layers + 1):
            features = self.width * min(2**layer, 8)
            x = conv(x, features, 2 if layer < self.layers else 1, f"conv_{layer}")
            x = nn.leaky_relu(nn.GroupNorm(_GROUPS, dtype=self.dtype, name=f"norm_{layer}")(x), 0.2)
        return conv(x, 1, 1, "conv_out")[..., 0].astype(jnp.float32)


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's loss, float32 (B,), for its outputs (B, P, Q) on images and reconstructions."""
    return 0.5 * (jnp.mean(nn.relu(1.0 - real), (1, 2)) + jnp.mean(nn.relu(1.0 + fake), (1, 2)))


def adaptive_weight(grad_reconstruction: jax.Array, grad_adversarial: jax.Array) -> jax.Array:
    """The weight that gives the adversarial loss a gradient as large as the reconstruction's.

    The ratio of the norms of both gradients with respect to the decoder's last layer, clipped to [0, 1e4] (Esser et al.
    2021, equation 7). No gradient flows through it.
    """
    ratio = jnp.linalg.norm(grad_reconstruction.ravel()) / (jnp.linalg.norm(grad_adversarial.ravel()) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))
