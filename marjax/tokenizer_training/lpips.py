"""LPIPS: the perceptual distance of images by VGG16 features (Zhang et al. 2018), with weights from the user's files.

Legend: B batch, S pixels per side, C channels.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marjax.interop.state_dict import read_state_dict

# Channels of VGG16's convolutions by block; the last output of a block is compared, and then pooled.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT = np.array([[[[-0.030, -0.088, -0.188]]]], np.float32)  # VGG16's normalisation, for images in [-1, 1]
_SCALE = np.array([[[[0.458, 0.448, 0.450]]]], np.float32)
_CLASSIFIER = r"classifier\.\d+\.(weight|bias)"


def names() -> dict[str, tuple[int, ...]]:
    """The tensors of torchvision's VGG16 that LPIPS needs, with their shapes in PyTorch's layout."""
    shapes: dict[str, tuple[int, ...]] = {}
    place, before = 0, 3
    for block in BLOCKS:
        for channels in block:
            shapes[f"features.{place}.weight"], shapes[f"features.{place}.bias"] = (channels, before, 3, 3), (channels,)
            place, before = place + 2, channels  # skips the ReLU
        place += 1  # skips the pooling
    return shapes


def linear_names() -> dict[str, tuple[int, ...]]:
    """The tensors of LPIPS's own file, with their shapes."""
    return {f"lin{i}.model.1.weight": (1, block[-1], 1, 1) for i, block in enumerate(BLOCKS)}


def read(vgg: str | os.PathLike[str], linear: str | os.PathLike[str]) -> Any:
    """Reads the weights, a tree of float32 arrays.

    Args:
      vgg: torchvision's file of VGG16 for ImageNet classification (vgg16-397923af.pth).
      linear: LPIPS's weights over its features (vgg.pth of the lpips package, or of taming-transformers).

    Raises:
      UserError: see `read_state_dict`.
    """
    features, _ = read_state_dict(
        vgg, names(), what="VGG16 of torchvision", advice="download it again", ignored=_CLASSIFIER
    )
    shares, _ = read_state_dict(
        linear, linear_names(), what="LPIPS's linear layers over VGG16", advice="download them again"
    )
    places = [name.removesuffix(".weight") for name in names() if name.endswith(".weight")]
    layers = [(features[f"{place}.weight"], features[f"{place}.bias"]) for place in places]
    return {
        "features": [{"kernel": weight.transpose(2, 3, 1, 0), "bias": bias} for weight, bias in layers],
        "linear": [share.reshape(-1) for share in shares.values()],
    }


def distance(params: Any, one: jax.Array, other: jax.Array) -> jax.Array:
    """LPIPS, float32 (B,), of float images (B, S, S, 1 or 3) in [-1, 1], S >= 16; grey images are repeated."""
    total = jnp.zeros(one.shape[0])
    pairs = zip(_features(params, one), _features(params, other), params["linear"], strict=True)
    for a, b, shares in pairs:
        total += jnp.mean(jnp.sum(jnp.square(_unit(a) - _unit(b)) * shares[None, None, None], -1), (1, 2))
    return total


def _unit(x: jax.Array) -> jax.Array:
    # The square root has no gradient at 0, where all features are 0.
    return x / (jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-20) + 1e-10)


def _features(params: Any, image: jax.Array) -> list[jax.Array]:
    x = (jnp.broadcast_to(image, (*image.shape[:3], 3)).astype(jnp.float32) - _SHIFT) / _SCALE
    layers, outputs = iter(params["features"]), []
    for number, block in enumerate(BLOCKS):
        if number:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for _ in block:
            layer = next(layers)
            x = jax.lax.conv_general_dilated(
                x,
                jnp.asarray(layer["kernel"]),
                (1, 1),
                ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )
            x = jax.nn.relu(x + layer["bias"][None, None, None])
        outputs.append(x)
    return outputs
