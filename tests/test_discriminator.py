import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marjax import config as config_lib
from marjax.errors import UserError
from marjax.tokenizer_training.discriminator import Discriminator, adaptive_weight, hinge


@pytest.mark.parametrize("layers, side, patches", [(1, 8, 2), (2, 12, 1), (3, 32, 2), (3, 24, 1)])
def test_patches(layers, side, patches):
    network = Discriminator(32, layers)
    shape = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((3, side, side, 1)))[0]
    assert shape.shape == (3, patches, patches)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_agrees_with_the_config(layers):
    config = config_lib.base()
    config.train.update(steps=10, warmup_steps=1)
    config.tokenizer.train.disc.update(weight=0.5, layers=layers)
    config.data.image_size = 3 * 2**layers
    config_lib.resolve(config)
    network = Discriminator(32, layers)
    image = jnp.zeros((1, config.data.image_size, config.data.image_size, 1))
    assert jax.eval_shape(network.init_with_output, jax.random.key(0), image)[0].shape == (1, 1, 1)
    config.data.image_size -= 1
    with pytest.raises(UserError, match=f"images of at least {3 * 2**layers} pixels"):
        config_lib.resolve(config)


def test_images_are_independent():
    network = Discriminator(32, 1)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    together, params = network.init_with_output(jax.random.key(1), images)
    alone = jnp.concatenate([network.apply(params, images[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert len(np.unique(np.asarray(together).round(6))) > 4


def test_hinge():
    real, fake = jnp.array([[[2.0, 0.5]], [[-1.0, -3.0]]]), jnp.array([[[-2.0, 0.0]], [[1.0, 3.0]]])
    np.testing.assert_allclose(hinge(real, fake), [0.5 * (0.25 + 0.5), 0.5 * (3.0 + 3.0)])


def test_adaptive_weight():
    towards, pull = jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]])
    np.testing.assert_allclose(adaptive_weight(towards, pull), 5.0 / (2.0 + 1e-4), rtol=1e-6)
    assert adaptive_weight(towards, 0.0 * pull) == 1e4 and adaptive_weight(0.0 * towards, pull) == 0.0
    assert (jax.grad(lambda x: adaptive_weight(x, pull))(towards) == 0.0).all()
