"""What a network has to offer to be measured with: features for distances, logits for scores."""

from typing import Protocol

import numpy as np


class FeatureExtractor(Protocol):
    """A frozen network over images; each row of a result depends on its own image only."""

    image_size: int  # pixels on a side of the images that the network sees
    num_features: int  # F, the width of `features`

    def features(self, images: np.ndarray) -> np.ndarray:
        """The last hidden layer, float32 (N, F), of images, uint8 (N, H, W, C); any N. Raises ValueError."""

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Unnormalised log probabilities of the K classes, float32 (N, K), of the same. Raises ValueError."""
