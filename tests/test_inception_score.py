"""The Inception Score: the reference's numbers, closed forms, any order of images, each exactly once."""

import numpy as np
import pytest
from support.compare import parity

from marjax.evaluation.metrics.inception_score import ScoreSums


def score(logits, order=None, batch=64, **arguments):
    sums = ScoreSums(len(logits), logits.shape[1], **arguments)
    order = np.arange(len(logits)) if order is None else order
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        sums.add(some, logits[some])
    return sums.result()


def test_agrees_with_the_reference():
    stored, _ = parity("fid_is")
    mean, std = score(stored["in/logits"])
    assert mean == pytest.approx(float(stored["out/is_mean"]), rel=1e-12)
    assert std == pytest.approx(float(stored["out/is_std"]), rel=1e-12)
    # Another shuffle or number of splits gives other numbers.
    assert score(stored["in/logits"], seed=0).mean != pytest.approx(mean, rel=1e-4)
    assert score(stored["in/logits"], splits=5).mean != pytest.approx(mean, rel=1e-4)


def test_closed_forms():
    sure = np.full((40, 4), -1e4)  # all other classes have probability 0
    sure[np.arange(40), np.arange(40) % 4] = 1e4
    assert score(sure, splits=1) == (pytest.approx(4.0), 0.0)
    assert score(np.tile([[1.0, 2.0, 3.0]], (40, 1))) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    assert score(sure[:, :1] * 0) == (pytest.approx(1.0), 0.0)


def test_splits_of_uneven_sizes_by_the_definition():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(47, 6)) * 2
    shuffled = np.exp(logits)[np.random.RandomState(2020).permutation(47)]
    p = shuffled / shuffled.sum(1, keepdims=True)
    expected = []
    for i in range(10):
        part = p[i * 47 // 10 : (i + 1) * 47 // 10]
        expected.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    assert score(logits) == (pytest.approx(np.mean(expected), rel=1e-12), pytest.approx(np.std(expected), rel=1e-12))


def test_batches_and_their_order_do_not_matter():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(100, 5)) + 300  # exp would overflow without the shift
    whole = score(logits, batch=100)
    for order, batch in ((None, 7), (rng.permutation(100), 13), (np.arange(100)[::-1], 1)):
        assert score(logits, order, batch) == pytest.approx(whole, rel=1e-12)
    assert score(logits[::-1]) != pytest.approx(whole, rel=1e-6)  # indices do matter


def test_each_image_once():
    logits = np.zeros((20, 3))
    sums = ScoreSums(20, 3)
    sums.add(np.arange(19), logits[:19])
    with pytest.raises(ValueError, match=r"1 of 20 images .*image 19, .* 0 "):
        sums.result()
    sums.add(np.array([19, 4]), logits[:2])
    with pytest.raises(ValueError, match=r"image 4, .* 2 "):
        sums.result()


def test_invalid_arguments():
    sums = ScoreSums(20, 3)
    with pytest.raises(ValueError, match="splits"):
        ScoreSums(9, 3)
    with pytest.raises(ValueError, match=r"\(B, 3\)"):
        sums.add(np.arange(2), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="expected\\s+\\[0, 20\\)"):
        sums.add(np.array([20]), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="finite"):
        sums.add(np.array([0]), np.full((1, 3), np.nan))
