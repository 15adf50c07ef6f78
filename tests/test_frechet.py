"""The Frechet distance: closed forms, a general matrix root, singular covariances."""

import numpy as np
import pytest
import scipy.linalg
from support.compare import parity
from support.hosts import on_hosts

from marjax.evaluation.metrics.frechet import Gaussian, Moments, frechet_distance, gaussian


def spd(rng, size):
    a = rng.normal(size=(size, 2 * size))
    return a @ a.T / size


def by_general_root(a, b):
    root = scipy.linalg.sqrtm(a.cov @ b.cov)
    return float(np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov + b.cov - 2 * root.real))


def test_mean_and_unbiased_covariance():
    rows = np.random.default_rng(0).normal(size=(20, 3))
    found = gaussian(rows.astype(np.float32))
    assert found.mean.dtype == found.cov.dtype == np.float64 and found.count == 20
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.cov, np.cov(rows.T), atol=1e-6)
    assert not np.allclose(found.cov, np.cov(rows.T, bias=True), atol=1e-2)


def test_diagonal_closed_form():
    rng = np.random.default_rng(1)
    (m1, m2), (v1, v2) = rng.normal(size=(2, 5)), rng.uniform(0.1, 4.0, size=(2, 5))
    expected = np.sum((m1 - m2) ** 2) + np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)
    a, b = (Gaussian(m, np.diag(v), 9) for m, v in ((m1, v1), (m2, v2)))
    assert frechet_distance(a, b) == pytest.approx(expected, 1e-12)


def test_commuting_closed_form():
    rng = np.random.default_rng(2)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    v1, v2 = rng.uniform(0.1, 4.0, size=(2, 6))
    a, b = (Gaussian(np.zeros(6), rotation * v @ rotation.T, 9) for v in (v1, v2))
    assert frechet_distance(a, b) == pytest.approx(np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2), 1e-10)


def test_covariances_that_do_not_commute():
    rng = np.random.default_rng(3)
    a, b = (Gaussian(rng.normal(size=8), spd(rng, 8), 9) for _ in range(2))
    assert np.abs(a.cov @ b.cov - b.cov @ a.cov).max() > 0.1
    assert frechet_distance(a, b) == pytest.approx(by_general_root(a, b), 1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), 1e-9)


def test_equal_sets_have_distance_zero_in_any_order():
    rng = np.random.default_rng(4)
    rows, others = rng.normal(size=(2, 50, 4))
    a, b = gaussian(rows), gaussian(others)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    shuffled = gaussian(rows[rng.permutation(50)])
    assert frechet_distance(a, b) > 0.01
    assert frechet_distance(shuffled, b) == pytest.approx(frechet_distance(a, b), 1e-9)


def test_singular_covariances():
    """The closed form holds for rank-deficient covariances: fewer rows than features, or constant features."""
    rng = np.random.default_rng(5)
    a, b = gaussian(rng.normal(size=(4, 16))), gaussian(rng.normal(size=(5, 16)))
    assert np.linalg.matrix_rank(a.cov) == 3
    # The trace of the root is the sum of the singular values of the product of the factors.
    factors = [np.linalg.svd(g.cov)[0] * np.sqrt(np.linalg.svd(g.cov)[1]) for g in (a, b)]
    nuclear = np.linalg.svd(factors[0].T @ factors[1])[1].sum()
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected, 1e-6)
    still = gaussian(np.ones((3, 16)))
    assert frechet_distance(still, still) == 0.0
    assert frechet_distance(still, a) == pytest.approx(np.sum((a.mean - 1) ** 2) + np.trace(a.cov), 1e-9)


def test_invalid_features():
    with pytest.raises(ValueError, match="at least 2"):
        gaussian(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="shape"):
        gaussian(np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        gaussian(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="different widths"):
        frechet_distance(gaussian(np.eye(3)), gaussian(np.eye(4)))
    moments = Moments(3)
    with pytest.raises(ValueError, match=r"give \(N, 3\)"):
        moments.add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="finite"):
        moments.add(np.full((2, 3), np.inf))
    moments.add(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="1 rows have no covariance"):
        moments.gaussian()


def test_agrees_with_the_reference():
    stored, _ = parity("fid_is")
    a, b = (gaussian(stored[f"in/features_{which}"]) for which in (1, 2))
    assert frechet_distance(a, b) == pytest.approx(float(stored["out/fid"]), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(float(stored["out/fid"]), rel=1e-10)


@pytest.mark.parametrize("smallest, tolerance", [(1e-6, 1e-12), (1e-12, 1e-7), (0.0, 1e-6)])
def test_ill_conditioned_covariances(smallest, tolerance):
    """Rotated variances over many orders of magnitude, with Cholesky's factor or the eigendecomposition."""
    rng = np.random.default_rng(6)
    rotation = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    v1 = np.concatenate([np.geomspace(1e-12, 10.0, 60), np.full(4, 1e-12)]).clip(smallest)
    v1[v1 == 1e-12] = smallest
    v2 = rng.permutation(v1)
    a, b = (Gaussian(np.zeros(64), (rotation * v) @ rotation.T, 0) for v in (v1, v2))
    expected = np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=10 * tolerance)


def test_moments_of_batches_of_any_size_far_from_the_origin():
    """Sums of squares would lose all digits of the variance here."""
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(101, 5)) * 1e-3 + 1e6
    assert np.abs((rows**2).mean(0) - rows.mean(0) ** 2 - rows.var(0)).max() > 1e-5
    expected = np.cov((rows - 1e6).T)
    for sizes in ([101], [1] * 101, [0, 2, 50, 49]):
        moments = Moments(5)
        for part in np.split(rows, np.cumsum(sizes)[:-1]):
            moments.add(part)
        found = moments.gaussian()
        assert found.count == moments.count == 101
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-15)
        np.testing.assert_allclose(found.cov, expected, rtol=1e-6, atol=1e-13)


def test_merged_moments_are_those_of_all_rows():
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(9000, 6)) @ spd(rng, 6) + np.arange(6)
    whole = gaussian(rows)
    np.testing.assert_allclose(whole.cov, np.cov(rows.T), rtol=1e-12)  # more rows than are converted at a time
    parts = np.split(rows, [10, 4000, 9000])  # the last is empty
    for order in (parts, parts[::-1]):

        def merged(processes, order=order):
            moments = Moments(6)
            moments.add(order[processes.index])
            found = moments.merged(processes).gaussian()
            return found.count, found.mean.tolist(), found.cov.tolist()

        count, mean, cov = on_hosts(4, merged)
        assert count == 9000
        np.testing.assert_allclose(mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(cov, whole.cov, rtol=1e-12, atol=1e-12)
    assert np.abs(gaussian(parts[0]).cov - whole.cov).max() > 0.1
