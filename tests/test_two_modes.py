"""The paper's point on one token: regression finds the conditional mean, a Gaussian is too wide, diffusion is right."""

import importlib.util

import numpy as np
import pytest
from support.paths import ROOT

spec = importlib.util.spec_from_file_location("two_modes", ROOT / "docs" / "two_modes.py")
two_modes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(two_modes)


def share_near_a_mode(points, labels):
    return (two_modes.near_a_mode(points, labels) >= 0).mean()


def test_the_data_are_near_their_modes():
    tokens, labels = two_modes.draw_data(0, 2000)
    assert share_near_a_mode(tokens[:, 0], labels) > 0.99


def test_one_gaussian_is_not_enough():
    assert share_near_a_mode(*two_modes.single_gaussian()) < 0.5


def test_regression_gives_the_conditional_mean():
    points, labels = two_modes.fit_and_sample("regression", n=10, steps=400)
    np.testing.assert_allclose(points, two_modes.MEANS[labels], atol=0.06)
    assert share_near_a_mode(points, labels) == 0.0


@pytest.mark.slow
def test_diffusion_recovers_both_modes():
    points, labels = two_modes.fit_and_sample("diffusion", n=600, steps=500)
    mode = two_modes.near_a_mode(points, labels)
    assert (mode >= 0).mean() > 0.95
    for c in (0, 1):
        assert 0.4 < (mode[labels == c] == 1).mean() / (mode[labels == c] >= 0).mean() < 0.6
