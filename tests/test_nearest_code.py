"""The nearest code, however close to another one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marjax.tokenizers.nearest_code import nearest


def test_agrees_with_float64():
    rng = np.random.default_rng(0)
    x, codes = rng.normal(size=(3, 50, 7)).astype(np.float32), rng.normal(size=(40, 7)).astype(np.float32)
    expected = np.argmin(((x[..., None, :].astype(np.float64) - codes) ** 2).sum(-1), -1)
    got = jax.jit(nearest)(x, codes)
    assert got.shape == (3, 50) and got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)
    assert len(set(np.ravel(expected))) > 30


def hard_codebook(clusters):
    """512 codes about 1e-3 from the next, a thousand from the origin; or half of them on its other side, so that no
    other origin makes them short."""
    steps = np.random.default_rng(1).permutation(512)[:, None] * np.array([1e-3, 0.0, 0.0, 0.0])
    sign = np.where(np.arange(512) % clusters, -1.0, 1.0)[:, None]
    return (sign * (1000.0 + steps)).astype(np.float32)


@pytest.mark.parametrize("clusters", [1, 2])
def test_every_code_is_nearest_to_itself(clusters):
    codes = hard_codebook(clusters)
    gaps = np.diff(np.unique(codes[:, 0]))
    assert len(np.unique(codes[:, 0])) == 512 and gaps.min() < 1.1e-3
    np.testing.assert_array_equal(jax.jit(nearest)(codes, codes), np.arange(512))
    # The codebook is hard: the product of matrices cannot tell its codes apart.
    quick = np.argmin((codes**2).sum(-1) - 2.0 * codes @ codes.T, -1)
    assert (quick != np.arange(512)).mean() > 0.5


def test_the_first_of_equally_near_codes():
    codes = jnp.array([[5.0], [1.0], [-1.0], [1.0]])
    np.testing.assert_array_equal(nearest(jnp.array([[0.0], [1.0], [-0.9], [3.0], [4.0]]), codes), [1, 1, 2, 0, 0])


def test_half_precision_is_compared_in_single():
    x = jnp.array([[1.0]], jnp.bfloat16)
    assert nearest(x, jnp.array([[1.001], [1.0]]))[0] == 1  # 1.001 is 1 in bfloat16
