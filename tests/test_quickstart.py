"""The quick start's promise: a classifier of real digits recognises the samples, and they are not copies."""

import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC
from support.paths import DIGITS


def marjax(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-m", "marjax", *arguments], check=True, env=environment)


@pytest.mark.slow
def test_digits_are_recognised_and_not_copied(tmp_path, capsys):
    run = str(tmp_path / "run")
    marjax("train", "--config", DIGITS, "--workdir", run)
    pixels = {}
    for name, more in (("guided", []), ("plain", ["--cfg", "1"])):
        marjax(
            "sample",
            "--workdir",
            run,
            "--labels",
            "0-9",
            "--num_per_label",
            "50",
            "--seed",
            "0",
            "--out",
            str(tmp_path / name),
            *more,
        )
        saved = np.load(tmp_path / name / "samples.npz")
        assert saved["labels"].tolist() == np.arange(10).repeat(50).tolist()
        pixels[name] = saved["images"].reshape(500, 64) * (16 / 255)

    real = load_digits()
    classifier = SVC(gamma=0.001).fit(real.data[:1400], real.target[:1400])
    assert classifier.score(real.data[1400:], real.target[1400:]) > 0.95
    labels = np.arange(10).repeat(50)
    accuracy = {name: classifier.score(images, labels) for name, images in pixels.items()}
    between = np.sort(pairwise_distances(real.data), axis=1)[:, 1]
    nearest = {name: pairwise_distances(images, real.data).min(axis=1) for name, images in pixels.items()}
    with capsys.disabled():
        for name in pixels:
            print(
                f"\n{name}: {accuracy[name]:.1%} recognised, median distance to the nearest real image "
                f"{np.median(nearest[name]):.1f}, between real images {np.median(between):.1f}"
            )
    assert accuracy["guided"] >= 0.95 and accuracy["plain"] >= 0.90
    for distance in nearest.values():
        # Copies would be at distances near 0; samples far from every real digit would not be digits.
        assert np.quantile(distance, 0.05) > 0.5 * np.quantile(between, 0.05)
        assert np.median(distance) < 1.6 * np.median(between)
