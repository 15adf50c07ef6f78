"""Dropout, table lookup, LayerNorm and initialisation of the dense layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marjax.nn.layers import Dense, Dropout, LayerNorm, dropout, lookup


@pytest.mark.parametrize("shape", [(64, 4, 33, 33), (500, 301), (200_000,)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_preserves_the_mean_and_is_uniform(shape, rate):
    masks = np.stack([np.asarray(dropout(jax.random.key(i), jnp.ones(shape), rate)) for i in range(4)])
    kept = masks != 0
    np.testing.assert_allclose(masks[kept], 1 / (1 - rate), rtol=1e-6)
    error = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * error
    # No axis, pair of neighbours or pair of keys is favoured.
    for axis in range(1, kept.ndim):
        means = np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1).mean(1)
        assert np.abs(means - (1 - rate)).max() < 6 * error * np.sqrt(kept.shape[axis])
        centred = kept - (1 - rate)
        neighbours = np.take(centred, range(1, kept.shape[axis]), axis) * np.take(
            centred, range(kept.shape[axis] - 1), axis
        )
        assert abs(neighbours.mean()) < 6 * rate * (1 - rate) / np.sqrt(neighbours.size)
    assert abs(np.mean((kept[0] - 1 + rate) * (kept[1] - 1 + rate))) < 6 * rate * (1 - rate) / np.sqrt(kept[0].size)


def test_dropout_gradient_uses_the_same_mask():
    x = jnp.arange(1.0, 1001.0).reshape(10, 100)
    y, vjp = jax.vjp(lambda x: dropout(jax.random.key(0), x, 0.3), x)
    np.testing.assert_allclose(vjp(jnp.ones_like(x))[0], y / x, rtol=1e-6)
    assert 0.2 < (y == 0).mean() < 0.4


def test_deterministic_dropout_is_the_identity():
    x = jnp.ones((4, 50))
    apply = Dropout(0.5).apply
    np.testing.assert_array_equal(apply({}, x, True), x)
    noisy = apply({}, x, False, rngs={"dropout": jax.random.key(0)})
    assert (np.asarray(noisy) == 0).any()
    assert (np.asarray(apply({}, x, False, rngs={"dropout": jax.random.key(1)})) != np.asarray(noisy)).any()


def test_lookup_and_its_gradient():
    table = jax.random.normal(jax.random.key(0), (11, 6))
    index = jax.random.randint(jax.random.key(1), (5, 40), 0, 11)
    weight = jax.random.normal(jax.random.key(2), (5, 40, 6))
    np.testing.assert_array_equal(lookup(table, index), table[index])
    ours = jax.grad(lambda t: (lookup(t, index) * weight).sum())(table)
    np.testing.assert_allclose(ours, jax.grad(lambda t: (t[index] * weight).sum())(table), atol=1e-5)


def test_dense_init_uses_the_fans_of_its_matrix():
    kernel = nn.unbox(
        Dense((64,), (3, 4, 16), ("embed", None, "heads", "kv")).init(jax.random.key(0), jnp.zeros((1, 64)))
    )["params"]["kernel"]
    limit = np.sqrt(6 / (64 + 192))
    assert kernel.shape == (64, 3, 4, 16) and 0.95 * limit < np.abs(kernel).max() <= limit


def test_layer_norm_statistics_are_float32():
    x = 1000.0 + jax.random.normal(jax.random.key(0), (8, 256))
    y = LayerNorm(affine=False, dtype=jnp.bfloat16).apply({}, x)
    assert y.dtype == jnp.bfloat16
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=0.02)
