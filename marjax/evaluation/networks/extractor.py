"""What a network has to offer to be measured with: features for distances, logits for scores.

Legend: N images of H x W pixels and C channels; F features, K classes, S spatial features.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from marjax.errors import UserError
from marjax.paths import takes_paths


class Extracted(NamedTuple):
    """What a network says of N images; each row depends on its own image only.

    Attributes:
      features: the last hidden layer, float32 (N, F).
      logits: unnormalised log probabilities of the K classes, float32 (N, K).
      spatial: features that still know places, float32 (N, S), or None where a network has none.
    """

    features: np.ndarray
    logits: np.ndarray
    spatial: np.ndarray | None = None


class FeatureExtractor(Protocol):
    """A frozen network over images.

    Attributes:
      name: of the kind of network, as `marjax evaluate --extractor` has it.
      checksum: SHA-256 of its weights.
      image_size: pixels on a side of the images that the network sees.
      num_features, num_classes: F and K.
      num_spatial: S; 0 where there are none.
    """

    name: str
    checksum: str
    image_size: int
    num_features: int
    num_classes: int
    num_spatial: int

    def extract(self, images: np.ndarray) -> Extracted:
        """Of images, uint8 (N, H, W, C); any N. Raises ValueError for others than the network takes."""


def checksum(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays, which are taken as float32, their names and shapes, in the order of the names."""
    made = hashlib.sha256()
    for name, array in sorted(weights.items()):
        made.update(f"{name} {array.shape}\n".encode())
        made.update(np.ascontiguousarray(array, "<f4").tobytes())
    return made.hexdigest()


@takes_paths("path")
def open_extractor(name: str, path: str = "") -> FeatureExtractor:
    """The network of that name with its weights.

    Args:
      name: "inception" or "classifier".
      path: of the weights; "" for the place where inception's are kept.

    Raises:
      UserError: there is none of that name, or no weights.
    """
    if name == "inception":
        from marjax.evaluation.networks.inception_file import open_inception

        return open_inception(path or None)
    if name == "classifier":
        from marjax.evaluation.networks.classifier import Classifier

        if not path:
            raise UserError(
                "no weights of the classifier: give the file that marjax train-classifier wrote "
                "(--extractor_path, config.eval.extractor_path)"
            )
        return Classifier.load(path)
    raise UserError(f"extractor is {name!r}: give inception or classifier")
