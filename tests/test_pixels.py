"""Pixels as latents: the scale goes in and comes out again."""

import numpy as np
from support.paths import DIGITS

from marjax import config as config_lib
from marjax import numerics
from marjax.tokenizers import open_tokenizer


def test_the_scale_of_the_config():
    image = np.linspace(-1, 1, 2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8, 1)
    config = config_lib.load(DIGITS)
    plain = open_tokenizer(config_lib.tokenizer_config(config_lib.resolve(config)))
    np.testing.assert_array_equal(plain.encode({}, image, numerics.key(0)), image)
    config = config_lib.resolve(config_lib.apply_overrides(config, {"tokenizer.autoencoder.scale": 0.25}))
    scaled = open_tokenizer(config_lib.tokenizer_config(config))
    latent = scaled.encode({}, image, numerics.key(0))
    np.testing.assert_array_equal(latent, image / 4)
    np.testing.assert_array_equal(scaled.decode({}, latent), image)
