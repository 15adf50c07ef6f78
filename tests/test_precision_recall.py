"""Precision and recall against a direct computation; equal, distant and tight sets, and duplicates."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from marjax.evaluation.metrics import precision_recall as module
from marjax.evaluation.metrics.precision_recall import precision_recall


def direct(real, generated, k=3):
    def share(points, manifold):
        radii = np.sort(cdist(manifold, manifold), axis=1)[:, k]  # the first is the point itself
        return (cdist(points, manifold) <= radii).any(axis=1).mean()

    real, generated = real.astype(np.float64), generated.astype(np.float64)
    return share(generated, real), share(real, generated)


def normal(rng, rows, features=16, scale=1.0):
    return (rng.normal(size=(rows, features)) * scale).astype(np.float32)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, which divide neither the sets nor each other."""
    monkeypatch.setattr(module, "_TALL", 33)
    monkeypatch.setattr(module, "_WIDE", 20)
    monkeypatch.setattr(module, "_PAIRS", 7)


@pytest.mark.parametrize("k", [1, 3, 25])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_agrees_with_a_direct_computation(small_tiles, k, offset):
    rng = np.random.default_rng(0)
    real, generated = normal(rng, 211) + np.float32(offset), normal(rng, 150, scale=1.2) + np.float32(offset + 0.2)
    found = precision_recall([real], [generated], k=k)
    assert found == direct(real, generated, k)
    assert 0.05 < found.precision < 0.995 and found.precision != found.recall


def test_a_tight_cluster_far_from_the_others(small_tiles):
    """Its distances vanish in float32 beside the squared norms."""
    rng = np.random.default_rng(1)
    far = np.float32(1000.0)
    real = np.concatenate([normal(rng, 60, 4), normal(rng, 60, 4) + far])
    generated = np.concatenate([normal(rng, 60, 4) * 2 - far, normal(rng, 40, 4) + far])
    found = precision_recall([real], [generated])
    assert found == direct(real, generated)
    assert 0.1 < found.precision < 0.4 and 0.1 < found.recall < 0.5


@pytest.mark.parametrize("copies", [1, 6])
def test_a_set_covers_itself(small_tiles, copies):
    rows = np.tile(normal(np.random.default_rng(2), 50), (copies, 1))
    shuffled = rows[np.random.default_rng(3).permutation(len(rows))]
    assert precision_recall([rows], [shuffled]) == (1.0, 1.0)
    # Between copies every radius is 0, and any shift leaves the manifold.
    moved = shuffled + np.float32(1e-3)
    assert (precision_recall([rows], [moved]) == (0.0, 0.0)) == (copies == 6)


def test_sets_far_apart_share_nothing():
    rng = np.random.default_rng(4)
    real = normal(rng, 80)
    assert precision_recall([real], [normal(rng, 80) + 100]) == (0.0, 0.0)
    # A generator of only a part of the data has full precision and partial recall.
    real = np.concatenate([real, normal(rng, 80) + 100])
    precision, recall = precision_recall([real], [real[:80]])
    assert precision == 1.0 and 0.45 < recall <= 0.5


def test_invalid_arguments():
    rows = np.zeros((4, 2), np.float32)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"{k}-th neighbours"):
            precision_recall([rows], [rows], k=k)
    with pytest.raises(ValueError, match="2 and 3"):
        precision_recall([rows], [np.zeros((4, 3), np.float32)])
    for blocks in ([], [rows, rows.astype(np.float64)], [rows, rows[:, :1]], [rows[0]], [rows.astype(int)]):
        with pytest.raises(ValueError, match="F and type"):
            precision_recall([rows], blocks)
