"""Orders, mask ratios, and gathers whose gradients are gathers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marjax import orders


def test_orders_are_permutations_with_uniform_first_position():
    order = np.asarray(orders.draw_orders(jax.random.key(0), 4000, 8))
    assert (np.sort(order, axis=1) == np.arange(8)).all()
    assert np.abs(np.bincount(order[:, 0]) / 4000 - 1 / 8).max() < 0.03
    rank = np.asarray(orders.ranks(order))
    assert (np.take_along_axis(order, rank, 1) == np.arange(8)).all()


@pytest.mark.parametrize("num_tokens", [16, 64, 256])
def test_mask_ratio(num_tokens):
    ratio = orders.MaskRatio()
    known = np.asarray(ratio.draw_num_known(jax.random.key(1), 40_000, num_tokens))
    most = orders.max_visible(num_tokens, 0.7)
    assert most == num_tokens - math.ceil(0.7 * num_tokens)
    assert known.min() == 0 and known.max() == most
    assert abs(known.mean() - ratio.expected_known(num_tokens)) < 0.03 * known.mean()


def test_mask_ratio_per_batch_and_per_image():
    def draw(per):
        return np.asarray(orders.MaskRatio(per=per).draw_num_known(jax.random.key(2), 64, 256))

    assert len(set(draw("batch"))) == 1 and len(set(draw("image"))) > 10


def test_gather_rows_and_its_gradient():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 7, 5)), jnp.float32)
    order = jnp.asarray(np.argsort(rng.random((3, 7))))
    chosen = order[:, :4].at[0, 1].set(7)  # one out of range
    inverse = jnp.where(orders.ranks(order) < 4, orders.ranks(order), 4).at[0, order[0, 1]].set(4)

    def plain(x):
        padded = jnp.concatenate([x, jnp.zeros((3, 1, 5))], axis=1)
        return jnp.stack([row[index] for row, index in zip(padded, chosen, strict=True)])

    np.testing.assert_array_equal(orders.gather_rows(x, chosen, inverse), plain(x))
    weight = jnp.asarray(rng.standard_normal((3, 4, 5)), jnp.float32)
    ours = jax.grad(lambda x: (orders.gather_rows(x, chosen, inverse) * weight).sum())(x)
    np.testing.assert_array_equal(ours, jax.grad(lambda x: (plain(x) * weight).sum())(x))


def test_gather_rows_compiles_without_scatter():
    x, index = jnp.ones((2, 8, 4)), jnp.tile(jnp.arange(8), (2, 1))
    text = jax.jit(jax.grad(lambda x: orders.gather_rows(x, index, index).sum())).lower(x).as_text()
    assert "gather" in text and "scatter" not in text
