"""Learning rate schedule, weight decay mask, clipping and EMA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paths import PARITY

from marjax import config as config_lib
from marjax.training import optimizer, step
from marjax.training.ema import ema_decay
from marjax.training.state import TrainState


def test_learning_rate_agrees_with_the_reference():
    theirs = json.loads((PARITY / "lr_schedule.json").read_text())
    epoch = 100  # steps
    for schedule, at, expected in theirs["rows"]:
        train = config_lib.base().train
        train.update(
            lr=theirs["lr"],
            min_lr=theirs["min_lr"],
            warmup_steps=theirs["warmup_epochs"] * epoch,
            steps=theirs["epochs"] * epoch,
            schedule=schedule,
        )
        np.testing.assert_allclose(optimizer.learning_rate(train)(round(at * epoch)), expected, rtol=1e-5, atol=1e-12)


def test_no_warmup_starts_at_the_peak():
    train = config_lib.base().train
    train.update(lr=0.5, warmup_steps=0, steps=10)
    assert float(optimizer.learning_rate(train)(0)) == 0.5


def test_decay_mask():
    tree = {
        "class_embedding": 0,
        "null_embedding": 0,
        "backbone": {
            "mask_token": 0,
            "encoder_pos_embed": 0,
            "z_proj": {"kernel": 0, "bias": 0},
            "z_proj_norm": {"scale": 0, "bias": 0},
        },
        "head": {"denoiser": {"input_proj": {"kernel": 0, "bias": 0}}},
    }
    assert optimizer.decay_mask(tree) == {
        "class_embedding": True,
        "null_embedding": True,
        "backbone": {
            "mask_token": True,
            "encoder_pos_embed": True,
            "z_proj": {"kernel": True, "bias": False},
            "z_proj_norm": {"scale": False, "bias": False},
        },
        "head": {"denoiser": {"input_proj": {"kernel": False, "bias": False}}},
    }


@pytest.mark.parametrize("warmup", [False, True])
def test_ema(warmup):
    train = config_lib.base().train
    train.update(lr=0.1, warmup_steps=0, steps=10, ema_decay=0.5, ema_warmup=warmup, weight_decay=0.0)
    tx = optimizer.make_optimizer(train)
    params = {"w": {"kernel": jnp.ones(3)}}
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, ema=params, opt_state=tx.init(params))
    for n in range(12):
        new = step.update(state, {"w": {"kernel": jnp.arange(3.0)}}, tx, ema_decay(0.5, warmup, state.step))
        decay = min(0.5, (1 + n) / (10 + n)) if warmup else 0.5
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, state.ema, new.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new.ema, expected)
        state = new
    assert int(state.step) == 12


@pytest.mark.parametrize("clip", [None, 0])
def test_no_clipping(clip):
    """Equals clipping at a norm that the gradient does not reach, and weights change."""
    gradients, moved = {"w": {"kernel": jnp.array([300.0, -400.0])}}, {}
    config = config_lib.base()
    for given in (clip, 1e9, 1.0):
        config.train.update(lr=0.1, warmup_steps=0, steps=10, weight_decay=0.0, schedule="constant", clip=given)
        tx = optimizer.make_optimizer(config.train)
        state = tx.init({"w": {"kernel": jnp.zeros(2)}})
        updates, state = tx.update(gradients, state, {"w": {"kernel": jnp.zeros(2)}})
        moved[given] = updates["w"]["kernel"], state[1][0].nu["w"]["kernel"]
        np.testing.assert_allclose(moved[given][0], [-0.1, 0.1], rtol=1e-4)
    np.testing.assert_array_equal(moved[clip][1], moved[1e9][1])
    assert (moved[clip][1] > 1e4 * moved[1.0][1]).all()
