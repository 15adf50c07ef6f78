"""Callbacks: calls, ending a run, and exceptions, after which the run is saved."""

import jax
import numpy as np
import pytest
from support.configs import QUICK, make_digits

import marjax
from marjax.errors import UserError
from marjax.training.callbacks import Callbacks


def config(**overrides):
    return make_digits(**QUICK | {"train__steps": 9, "checkpoint__every": 9} | overrides)


def test_metrics_and_steps(tmp_path):
    """A callback that raises ends and saves the run; resumed, the run ends when a callback returns True."""
    seen, states = [], []

    def on_metrics(step, metrics):
        assert type(metrics["train/loss"]) is float and "train/grad_norm" in metrics
        seen.append(step)

    def on_step(step, state):
        states.append((step, int(state.step), jax.device_get(state.ema)["class_embedding"].copy()))
        if step == 2:
            raise KeyError("mine")
        return [True]  # not a bool: continues

    with pytest.raises(KeyError, match="mine") as caught:
        marjax.train(config(), tmp_path, on_metrics=on_metrics, on_step=on_step)
    assert "on_step at step 2" in caught.value.__notes__[0]
    enough = lambda step, metrics: np.bool_(on_metrics(step, metrics) or step >= 3)  # noqa: E731
    state = marjax.train(config(), tmp_path, on_metrics=enough, on_step=on_step)
    assert [step for step, _, _ in states] == [state for _, state, _ in states] == [1, 2, 3, 4]
    assert (tmp_path / "checkpoints" / "4").exists()
    assert len({ema.tobytes() for _, _, ema in states}) == 4
    assert seen == [1, 2, 3, 4] and int(state.step) == 4  # metrics of step 3 are read while step 4 runs


def test_invalid_callback(tmp_path):
    for name in ("on_metrics", "on_step"):
        with pytest.raises(UserError, match=name):
            marjax.train(config(), tmp_path / "run", **{name: "print"})
    assert not (tmp_path / "run").exists()


def test_other_callback_continues_after_a_failure():
    calls = []

    def on_metrics(step, metrics):
        calls.append(step)
        raise ValueError("mine")

    callbacks = Callbacks(on_metrics, lambda step, state: calls.append("step"))
    callbacks.metrics(1, {"train/loss": 2.0})
    callbacks.metrics(2, {})
    callbacks.step(2, None)
    assert calls == [1, "step"] and callbacks.ended(True)
    with pytest.raises(ValueError, match="mine"):
        callbacks.finish()
