"""Encodes and decodes images with the autoencoder file of its argument on meshes of eight devices, in chunks."""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from support.configs import make_autoencoder

from marjax import config as config_lib
from marjax import sharding
from marjax.tokenizers import autoencoder, open_tokenizer

autoencoder._VALUES_AT_ONCE = 2 * 8 * 8 * 32  # two images
IMAGES = np.random.default_rng(0).uniform(-1, 1, (32, 8, 8, 1)).astype(np.float32)


def run(tokenizer: Any, shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> Any:
    """Latents and images. Fails where devices send anything, or convolve more than two images at once."""
    mesh = sharding.make_mesh(*shape, devices=devices)
    with jax.set_mesh(mesh):
        given = sharding.put_batch(IMAGES, mesh)
        params = sharding.put_replicated(tokenizer.params, mesh)
        by_row = sharding.batch_sharding(mesh)
        encode = jax.jit(lambda p, x: tokenizer.encode(p, x, jax.random.key(0)), out_shardings=by_row)
        decode = jax.jit(tokenizer.decode, out_shardings=by_row)
        latent = encode(params, given)
        image = decode(params, latent)
        texts = [encode.lower(params, given).compile().as_text(), decode.lower(params, latent).compile().as_text()]
    for text in texts:
        assert text and "while(" in text
        for word in ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute("):
            assert word not in text, word
        assert "f32[2,8,8,32]" in text and "f32[4,8,8,32]" not in text and "f32[32,8,8,32]" not in text
    return jax.device_get((latent, image))


def main(path: str) -> None:
    assert len(jax.devices()) == 8
    tokenizer = open_tokenizer(config_lib.tokenizer_config(make_autoencoder("kl", path)))
    one = run(tokenizer, (1, 1, 1), jax.devices()[:1])
    for shape in ((8, 1, 1), (2, 2, 2)):
        for sharded, alone in zip(run(tokenizer, shape, jax.devices()), one, strict=True):
            np.testing.assert_allclose(sharded, alone, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1])
