"""Writes Inception's features on two devices. Arguments: the weights file, the images (npy), the output (npz)."""

import sys
from typing import Any

import jax
import numpy as np

from marjax.evaluation.networks.inception_file import open_inception

if __name__ == "__main__":
    weights, images, out = sys.argv[1:]
    assert jax.device_count() == 2
    features: Any = open_inception(weights, batch_size=2).extract(np.load(images))
    np.savez(out, *features)
