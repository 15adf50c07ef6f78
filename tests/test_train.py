"""Whole runs: resume to the bit, damaged checkpoints, losses that are not finite, what is left on disk."""

import json
import logging
import shutil
import time

import jax
import numpy as np
import pytest
from support.compare import assert_same, lines
from support.configs import MODELS, QUICK, make_digits, make_model

from marjax import config as config_lib
from marjax import train
from marjax.errors import TrainingError, UserError


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    return train(make_digits(**QUICK), workdir), workdir


@pytest.mark.parametrize("variant, head", MODELS)
def test_four_steps_are_two_and_two_more(tmp_path, codebook, variant, head):
    config = make_model(variant, head, codebook)
    whole, whole_dir = train(config, tmp_path / "whole"), tmp_path / "whole"
    parts = shutil.copytree(whole_dir, tmp_path / "parts")
    shutil.rmtree(parts / "checkpoints" / "4")
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["2"]
    assert_same(train(config, parts), whole)
    assert lines(parts) == lines(whole_dir) and [row["step"] for row in lines(parts)] == [1, 2, 3, 4]


def test_a_run_that_is_complete_is_left_alone(undisturbed):
    whole, workdir = undisturbed
    before = (workdir / "metrics.jsonl").read_bytes()
    assert_same(train(make_digits(**QUICK), workdir), whole)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_codebook_is_refused(tmp_path, codebook):
    """Codes are meaningless without theirs, in a second start and in sampling alike."""
    from marjax import sample

    own = tmp_path / "codebook.npz"
    own.write_bytes(codebook.read_bytes())
    config = make_model("mar", "categorical", own, train__steps=2)
    train(config, tmp_path / "run")
    assert sample(tmp_path / "run", [0, 1]).shape == (2, 8, 8, 1)
    with np.load(codebook) as arrays:
        other = {name: arrays[name] for name in arrays.files}
    name = next(name for name, array in other.items() if array.shape == (16, 4))
    np.savez(own, **other | {name: other[name][::-1]})
    with pytest.raises(UserError, match="another"):
        sample(tmp_path / "run", [0, 1])
    with pytest.raises(UserError, match="another config: tokenizer.checksum"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("how", ["truncate", "overwrite"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, undisturbed, caplog, how):
    whole, whole_dir = undisturbed
    shutil.copytree(whole_dir, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "4"
    files = [path for path in (newest / "params").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    if how == "truncate":
        victim.write_bytes(data[: len(data) // 2])
    else:  # all over the file: some of it are nodes that later ones have replaced, which nobody reads
        data[::64] = bytes(byte ^ 0xFF for byte in data[::64])
        victim.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = train(make_digits(**QUICK), tmp_path)
    assert "4 is damaged" in caplog.text and "trying step 2" in caplog.text
    assert_same(again, whole)
    assert lines(tmp_path) == lines(whole_dir)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4"}


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    config = make_digits(**QUICK, train__lr=1e30, train__warmup_steps=3, train__steps=8, log__every=3)
    with pytest.raises(TrainingError, match="not finite in steps? 2.*there is no checkpoint yet"):
        train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_the_last_good_checkpoint_stays_the_newest(tmp_path):
    train(make_digits(**QUICK, train__steps=2), tmp_path)
    import unittest.mock

    from marjax.training import train as train_lib

    real = train_lib.make_train_step

    def poisoned(*args, **kwargs):
        step = real(*args, **kwargs)

        def run(state, batch, params):
            state, metrics = step(state, batch, params)
            return state, metrics | {"finite": metrics["finite"] * (metrics["train/loss"] < 0)}

        return jax.jit(run)

    with (
        unittest.mock.patch.object(train_lib, "make_train_step", poisoned),
        pytest.raises(TrainingError, match="in steps? 3.*newest checkpoint is of step 2"),
    ):
        train(make_digits(**QUICK, train__steps=8), tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2"}
    assert int(train(make_digits(**QUICK, train__steps=8), tmp_path).step) == 8


def test_refusals_before_anything_is_written(tmp_path):
    for overrides, says in (
        ({"data.split": "train[5:5]"}, "empty|no examples"),
        ({"mesh.data": 3}, "needs 3 devices"),
        (
            {"tokenizer.name": "kl16", "data.image_size": 64, "data.channels": 3, "sample.num_iter": 4},
            "path is empty.*marjax convert",
        ),
        ({"data.source": "cats"}, "cats"),
    ):
        with pytest.raises(UserError, match=says):
            train(config_lib.apply_overrides(make_digits(), overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_shape_is_refused(undisturbed, tmp_path):
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"width": 32', '"width": 64'))
    with pytest.raises(UserError, match="checkpoint of another model"):
        train(make_digits(**QUICK, model__width=64, model__denoiser__width=64), tmp_path)


def test_what_a_run_leaves(tmp_path):
    train(make_digits(log__samples_every=2, log__tensorboard=True, sample__batch_size=4), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "started.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "tensorboard",
    }
    from PIL import Image

    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == ["raw_and_ema_00000002.png", "raw_and_ema_00000004.png"]
    assert np.asarray(Image.open(pictures[0])).std() > 0
    assert list((tmp_path / "tensorboard").glob("events*"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = set().union(*rows)
    assert {
        "train/loss",
        "train/mse",
        "train/vb",
        "train/loss_t_quarter1",
        "train/grad_norm",
        "train/param_norm",
        "train/lr",
        "perf/images_per_sec_per_chip",
        "perf/mfu",
        "perf/step_seconds_p50",
        "perf/step_seconds_p99",
        "perf/host_seconds_p50",
        "perf/checkpoint_seconds",
        "perf/draw_seconds",
        "perf/goodput",
        "data/wait_frac",
    } <= names


def test_waiting_for_data_is_told(undisturbed, tmp_path, monkeypatch):
    """A slow source shows in data/wait_frac, one that keeps up does not."""
    from marjax.data.pipeline import Batches

    def share(workdir):
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return np.median([row["data/wait_frac"] for row in rows if "data/wait_frac" in row])

    following = Batches.__next__

    def slow(self):
        time.sleep(0.5)
        return following(self)

    monkeypatch.setattr(Batches, "__next__", slow)
    train(make_digits(**QUICK), tmp_path / "slow")
    assert share(tmp_path / "slow") > 0.6 > share(undisturbed[1])


def test_a_trace_of_some_steps(tmp_path):
    with pytest.raises(UserError, match="3:9"):
        train(make_digits(**QUICK), tmp_path / "run", profile=(3, 9))
    train(make_digits(**QUICK), tmp_path / "run", profile=(2, 3))
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    train(make_digits(**QUICK), tmp_path / "run", profile=(2, 3))  # again, after a preemption: those steps are behind
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1


def test_implicit_transfers_in_the_hot_loop_are_refused(tmp_path, monkeypatch):
    from marjax.training import train as train_lib

    real = train_lib.compile_step

    def slow(*args, **kwargs):
        step = real(*args, **kwargs)
        offset = np.ones(())  # stays on the host, so that each step sends it to the devices

        def run(state, batch, params):
            state, metrics = step(state, batch, params)
            return state, metrics | {"train/loss": metrics["train/loss"] + offset}

        return run

    monkeypatch.setattr(train_lib, "compile_step", slow)
    with pytest.raises(Exception, match="transfer"):
        train(make_digits(**QUICK, train__steps=2), tmp_path)
