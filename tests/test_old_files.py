"""What marjax wrote in the past is still read: a work directory and a latent cache of config format 2.

tests/old/format2.tar.xz was made by the last version with that format: two steps of `make_digits`, samples of them, and
the latents of 40 digits under the tokenizer of the fixture `autoencoders`.
"""

import json
import tarfile

import numpy as np
import pytest
from support.configs import make_autoencoder, make_digits
from support.paths import ROOT

import marjax


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ROOT / "tests" / "old" / "format2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_old_work_directory_is_sampled_from_and_resumed(old):
    images = np.load(old / "samples.npz")["images"]
    found = marjax.sample(old / "workdir", [1, 5, -1], seed=2)
    assert np.abs(found.astype(int) - images.astype(int)).max() <= 2  # other machines round otherwise
    assert steps(old / "workdir") == [1, 2]
    marjax.train(make_digits(train__steps=3, train__lr=1e-2), old / "workdir")
    assert steps(old / "workdir") == [1, 2, 3]


@pytest.mark.slow
def test_an_old_latent_cache_is_trained_from(old, autoencoders):
    config = make_autoencoder(
        "kl",
        autoencoders / "kl.safetensors",
        data__split="train[:40]",
        data__num_examples=40,
        data__cache=str(old / "latents"),
        train__steps=1,
    )
    marjax.train(config, old / "run")
    assert steps(old / "run") == [1]
