"""The contract of networks for metrics: features for distances, logits for scores.

Legend: N images of H x W pixels and C channels; F features, K classes, S spatial features.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np


class Extracted(NamedTuple):
    """The outputs of a network for N images; each row depends on its own image only.

    Attributes:
      features: the last hidden layer, float32 (N, F).
      logits: unnormalised log probabilities of the K classes, float32 (N, K).
      spatial: spatial features, float32 (N, S), or None if the network has none.
    """

    features: np.ndarray
    logits: np.ndarray
    spatial: np.ndarray | None = None


class FeatureExtractor(Protocol):
    """A frozen network over images.

    Attributes:
      name: the value of `marjax evaluate --extractor`.
      checksum: SHA-256 of its weights.
      image_size: side of the network's input, in pixels.
      num_features, num_classes: F and K.
      num_spatial: S; 0 for none.
    """

    name: str
    checksum: str
    image_size: int
    num_features: int
    num_classes: int
    num_spatial: int

    def extract(self, images: np.ndarray) -> Extracted:
        """Evaluates images, uint8 (N, H, W, C), for any N. Raises ValueError: another type or shape."""


def identity(extractor: FeatureExtractor) -> dict[str, str]:
    """The extractor's name and checksum, as files store them."""
    return {"name": extractor.name, "checksum": extractor.checksum}


def checksum(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and float32 values, in the order of the names."""
    made = hashlib.sha256()
    for name, array in sorted(weights.items()):
        made.update(f"{name} {array.shape}\n".encode())
        made.update(np.ascontiguousarray(array, "<f4").tobytes())
    return made.hexdigest()
