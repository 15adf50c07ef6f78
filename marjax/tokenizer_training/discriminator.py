"""The patch discriminator that an autoencoder may be trained against (Isola et al. 2017; Esser et al. 2021, VQGAN).

Legend: B batch, H x W pixels, C channels, P x Q patches.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_GROUPS = 32


class Discriminator(nn.Module):
    """How real each patch of an image looks: float32 (B, P, Q) from float images (B, H, W, C) in [-1, 1].

    Convolutions of 4 x 4, `layers` of them with stride 2, then two with stride 1. VQGAN normalises over
    the batch, by which the images of a batch judge each other; here GroupNorm does it, so that what an image gets does
    not depend on the others, nor on how a batch is spread over devices.

    Attributes:
      width: channels of the first layer, a multiple of 32; doubled by each of the next, up to 8 times.
      layers: how many layers have stride 2; an image has at least 3 * 2**layers pixels a side.
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
    """The discriminator's loss, float32 (B,), of its outputs (B, P, Q) on images and reconstructions."""
    return 0.5 * (jnp.mean(nn.relu(1.0 - real), (1, 2)) + jnp.mean(nn.relu(1.0 + fake), (1, 2)))


def adaptive_weight(grad_reconstruction: jax.Array, grad_adversarial: jax.Array) -> jax.Array:
    """What the adversarial loss is multiplied with so that it pulls as strongly as reconstruction does.

    The quotient of the norms of both gradients with respect to the decoder's last layer, + 1e-4, within [0, 1e4]
    (Esser et al. 2021, equation 7). A constant to differentiation.
    """
    ratio = jnp.linalg.norm(grad_reconstruction.ravel()) / (jnp.linalg.norm(grad_adversarial.ravel()) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))
