"""KID: the definition pair by pair, its value for equal sets, no bias."""

import numpy as np
import pytest

from marjax.evaluation.metrics.kernel_distance import kernel_distance


def direct(x, y):
    """Equation 4 of Binkowski et al., one pair at a time."""

    def mean(pairs):
        return np.mean([(float(np.dot(a, b)) / len(a) + 1.0) ** 3 for a, b in pairs])

    x, y = x.astype(np.float64), y.astype(np.float64)
    within = [mean([(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]) for rows in (x, y)]
    return sum(within) - 2 * mean([(a, b) for a in x for b in y])


def normal(seed, rows, features=8):
    return np.random.default_rng(seed).normal(size=(rows, features)).astype(np.float32)


def test_subsets_as_torch_fidelity_draws_them():
    x, y = normal(0, 60), normal(1, 40) + np.float32(0.3)
    rng, expected = np.random.RandomState(2020), []
    for _ in range(11):  # more than one pass over the blocks
        first = x[rng.choice(60, 25, replace=False)]
        expected.append(direct(first, y[rng.choice(40, 25, replace=False)]))
    found = kernel_distance([x], [y], subsets=11, size=25)
    assert found.mean == pytest.approx(np.mean(expected), rel=1e-10)
    assert found.std == pytest.approx(np.std(expected), rel=1e-10)
    assert kernel_distance([x], [y], subsets=11, size=25, seed=0).mean != pytest.approx(found.mean, rel=1e-3)
    assert kernel_distance([y], [x], subsets=11, size=25).mean != pytest.approx(found.mean, rel=1e-3)


def test_sets_smaller_than_a_subset_are_used_in_full():
    x, y = normal(2, 30), normal(3, 20) + np.float32(0.3)
    found = kernel_distance([x], [y], subsets=3)
    assert found.mean == pytest.approx(direct(x, y), rel=1e-10) and found.std == pytest.approx(0.0, abs=1e-12)
    shuffled = kernel_distance([x[::-1]], [np.roll(y, 7, axis=0)], subsets=3)
    assert shuffled.mean == pytest.approx(found.mean, rel=1e-12)


def test_a_set_and_itself():
    """The kernel's diagonal is excluded within a set but not between two sets, which gives a known value."""
    x = normal(4, 50)
    kernel = (x.astype(np.float64) @ x.T.astype(np.float64) / 8 + 1) ** 3
    expected = 2 / 49 * (kernel.sum() - 50 * np.trace(kernel)) / 50**2
    assert expected < -0.01
    assert kernel_distance([x], [x], subsets=2).mean == pytest.approx(expected, rel=1e-10)


def test_two_sets_of_one_distribution_have_distance_zero_on_average():
    estimates = [
        kernel_distance([normal(100 + seed, 50)], [normal(900 + seed, 50)], subsets=1).mean for seed in range(200)
    ]
    error = np.std(estimates) / np.sqrt(200)
    assert min(estimates) < 0 < max(estimates) and abs(np.mean(estimates)) < 3 * error
    apart = kernel_distance([normal(100, 50)], [normal(900, 50) + np.float32(0.5)], subsets=1).mean
    assert apart > 10 * error


def test_invalid_arguments():
    rows = normal(0, 4)
    for arguments in ({"subsets": 0}, {"size": 1}):
        with pytest.raises(ValueError, match="subsets"):
            kernel_distance([rows], [rows], **arguments)
    with pytest.raises(ValueError, match="subsets"):
        kernel_distance([rows], [rows[:1]])
    with pytest.raises(ValueError, match="different widths"):
        kernel_distance([rows], [rows[:, :3]])
