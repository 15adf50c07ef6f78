"""The picture of a training run: number of samples within the FLOPs budget."""

import numpy as np
import pytest

from marjax import config as config_lib
from marjax.assembly import assemble
from marjax.training.picture import Picture


def picture(name, **fields):
    given = {key.replace("__", "."): value for key, value in fields.items()}
    config = config_lib.resolve(config_lib.apply_overrides(config_lib.load(f"configs/{name}"), given))
    return Picture.from_config(config, assemble(config).generator)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_quick_start_shows_every_class_within_the_budget():
    found = picture("digits.py")
    assert found.count % 10 == 0 and found.count >= 20 and 0.01 < found.share <= 0.02
    assert found.sample.num_iter == 16
    assert str(found.count) in str(found) and "1.8%" in str(found)


def test_count_depends_on_steps_between_pictures():
    counts = [
        picture("digits.py", log__samples_every=every, train__steps=20_000).count for every in (400, 800, 1600, 20_000)
    ]
    assert counts == [20, 50, 100, 100]
    assert picture("digits.py", log__samples_every=20_000, train__steps=400).count == 20  # the run ends earlier
    assert picture("digits.py", log__samples_every=2000, train__steps=2000, sample__batch_size=16).count == 10


def test_expensive_pictures_use_fewer_steps():
    found = picture("digits.py", log__samples_every=50)
    assert (found.count, found.sample.num_iter) == (10, 8)
    assert found.share == picture("digits.py", log__samples_every=50, sample__num_iter=8).share < 0.04
    # Causal variants predict one token per step: num_iter is fixed.
    assert picture("mnist.py:variant=ar", log__samples_every=1).sample.num_iter == 49


def test_each_class_stays_in_its_columns():
    labels = []

    def sampler(params, given, seed, batch_size):
        labels.append(given.tolist())
        return np.full((batch_size, 2, 2, 1), params, np.uint8)

    found = picture("digits.py")
    drawn = found.draw(sampler, 10, 20, seed=0)
    assert labels == [list(range(10)) * (found.count // 10)] * 2
    assert drawn.shape[1] > 2 * 10 * 2  # ten columns per kind of weights
    assert (drawn[:, : drawn.shape[1] // 2] != 20).all() and (drawn[:, drawn.shape[1] // 2 :] != 10).all()
