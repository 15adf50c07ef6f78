"""The quick start's promise: samples that a classifier of real digits recognises, and that are no copies."""

import numpy as np
import pytest
from conftest import DIGITS
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC

from marjax import config as config_lib
from marjax import sample, train


@pytest.mark.slow
def test_digits_are_recognised_and_not_copied(tmp_path, capsys):
    train(config_lib.apply_overrides(config_lib.load(DIGITS), {"log.samples_every": 0, "log.tensorboard": False}),
          tmp_path)
    real = load_digits()
    classifier = SVC().fit(real.data[:1400], real.target[:1400])
    assert classifier.score(real.data[1400:], real.target[1400:]) > 0.95

    labels = np.arange(10).repeat(50)
    pixels = {cfg: sample(tmp_path, labels, cfg=cfg, seed=0).reshape(500, 64) * (16 / 255) for cfg in (None, 1.0)}
    accuracy = {cfg: classifier.score(images, labels) for cfg, images in pixels.items()}
    between = np.sort(pairwise_distances(real.data), axis=1)[:, 1]
    nearest = {cfg: pairwise_distances(images, real.data).min(axis=1) for cfg, images in pixels.items()}
    with capsys.disabled():
        print(f"\nrecognised: {accuracy[None]:.1%} with guidance, {accuracy[1.0]:.1%} without; median distance to the "
              f"nearest real image: {np.median(nearest[None]):.1f} and {np.median(nearest[1.0]):.1f}, between real "
              f"images {np.median(between):.1f}")
    assert accuracy[None] >= 0.95 and accuracy[1.0] >= 0.90
    for distance in nearest.values():
        # A copier's distances would crowd near 0; and what is far from every digit is no digit.
        assert np.quantile(distance, 0.05) > 0.5 * np.quantile(between, 0.05)
        assert np.median(distance) < 1.6 * np.median(between)
