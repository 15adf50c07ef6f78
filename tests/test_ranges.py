"""Every number that a user can give has a range, and none lets through what is no number."""

import argparse
import math

import numpy as np
import pytest
from support.configs import make_digits
from support.paths import DIGITS

import marjax
from marjax import cli
from marjax import config as config_lib
from marjax.commands.arguments import SAMPLE_FIELDS
from marjax.config.overrides import known_fields
from marjax.config.schema import NONE_IS_OFF, RANGES
from marjax.errors import UserError
from marjax.ranges import ARGUMENTS, BELOW_ONE, Range, check_arguments, integer
from marjax.workdir import claim_workdir

NUMBERS = [key for key, field in known_fields().items() if field.kind in (int, float, tuple)]


@pytest.fixture(scope="module")
def digits():
    return make_digits()


def test_every_number_has_a_range(digits):
    assert set(NUMBERS) == RANGES.keys()
    assert len(NUMBERS) > 70
    for key, default in config_lib.flatten(config_lib.resolve(digits)).items():
        if key in RANGES and default is not None:
            for number in default if isinstance(default, tuple) else (default,):
                RANGES[key].check(key, number)


@pytest.mark.parametrize("key", NUMBERS)
def test_what_no_number_of_the_config_may_be(digits, key):
    kind = known_fields()[key].kind
    values = [math.nan, math.inf, -math.inf, 1e39, -1e-3] if kind is float else [-2, -(10**30), 10**30, 2**63, 10**5000]
    for value in values:
        value = (value,) if kind is tuple else value
        with pytest.raises(UserError, match=f"config.{key} "):
            config_lib.resolve(config_lib.apply_overrides(digits, {key: value}))
    given = config_lib.apply_overrides(digits, {})
    given.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key} "):
        config_lib.resolve(given)
    text = "nan" if kind is float else "1" * 30
    with pytest.raises(UserError, match=key):
        config_lib.resolve(config_lib.apply_overrides(digits, {key: text}))


@pytest.mark.parametrize("key", [key for key in NUMBERS if RANGES[key].low > 0 and key not in NONE_IS_OFF])
def test_zero_where_nothing_would_happen(digits, key):
    zero = known_fields()[key].kind(0) if known_fields()[key].kind is not tuple else (0,)
    with pytest.raises(UserError, match=key.rsplit(".", 1)[-1]):
        config_lib.resolve(config_lib.apply_overrides(digits, {key: zero}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.ema_decay", 1.0),
        ("train.ema_decay", 1.0 - 1e-9),
        ("train.b2", 1.0),
        ("train.lr", 1e-40),
        ("train.clip", 1e-12),
        ("tokenizer.train.clip", 1e-12),
        ("model.mask_ratio.minimum", 1.0),
        ("data.channels", 2),
        ("model.attn_dropout", 1.0),
        ("model.class_dropout", 1.01),
        ("tokenizer.autoencoder.channel_mults", (1,) * 99),
        ("seed", 2**32),
        ("eval.num_images", 1),
    ],
)
def test_what_would_train_nothing_or_overflow(digits, key, value):
    with pytest.raises(UserError, match=key):
        config_lib.resolve(config_lib.apply_overrides(digits, {key: value}))


def test_derived_numbers_are_checked_too(digits):
    for fields, says in (
        ({"train.lr": None, "train.base_lr": 1e-30}, "train.lr"),
        ({"train.steps": None, "train.epochs": 1e-3}, "train.steps is 0"),
        ({"train.steps": None, "train.epochs": 1e9, "data.num_examples": 2**40}, "train.steps"),
        ({"model.mask_ratio.mean": 2.0, "model.mask_ratio.std": 1e-3}, "mask_ratio"),
    ):
        with pytest.raises(UserError, match=says):
            config_lib.resolve(config_lib.apply_overrides(digits, fields))


def numeric_arguments():
    """(command, name, type) of every number on the command line."""
    parser = cli._parser()
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [
        (name, action.dest, action.type)
        for name, sub in subparsers.choices.items()
        for action in sub._actions
        if action.type in (int, float) and name != "sweep-point"
    ]  # which only `sweep` starts


def test_every_argument_that_is_a_number_has_a_range():
    found = numeric_arguments()
    assert len(found) > 25
    for command, name, kind in found:
        assert (command == "sample" and name in SAMPLE_FIELDS) or ARGUMENTS[name].whole == (kind is int)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_no_argument_may_be(name):
    wrong = [-1, 10**30, 10**5000, 1.5, math.nan, math.inf, "1", True, [1]]
    for value in wrong if ARGUMENTS[name].whole else [-1e-3, math.nan, math.inf, -math.inf, 1.0, "0.1", True]:
        with pytest.raises(UserError, match=f"{name} is "):
            check_arguments(**{name: value})
    check_arguments(**{name: None})
    good = ARGUMENTS[name].low
    check_arguments(**{name: np.int64(good) if ARGUMENTS[name].whole else np.float32(good)})


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["sample", "--workdir", "RUN", "--out", "OUT", "--num_per_label", "1" + "0" * 30], "num_per_label"),
        (["sample", "--workdir", "RUN", "--out", "OUT", "--seed", "-1"], "seed"),
        (["sample", "--workdir", "RUN", "--out", "OUT", "--labels", "0-9999999999"], "labels"),
        (["sample", "--workdir", "RUN", "--out", "OUT", "--labels", "9" * 5000], "labels"),
        (["sample", "--workdir", "RUN", "--out", "OUT", "--temperature", "nan"], "temperature is nan"),
        (["sample", "--workdir", "RUN", "--out", "OUT", "--cfg", "inf"], "cfg is inf"),
        (["evaluate", "--workdir", "RUN", "--num_images", "1" + "0" * 30], "num_images"),
        (["evaluate", "--workdir", "RUN", "--batch_size", "-5"], "batch_size"),
        (["evaluate", "--workdir", "RUN", "--step", "-5"], "step is -5"),
        (["evaluate", "--workdir", "RUN", "--temperature", "1.0,nan"], "temperature is nan"),
        (["prepare", "--images", "RUN", "--out", "OUT", "--val_share", "nan"], "val_share is nan"),
        (["prepare", "--images", "RUN", "--out", "OUT", "--workers", "1000000"], "workers"),
        (["train-classifier", "--config", "DIGITS", "--out", "OUT", "--held_out", "nan"], "held_out is nan"),
        (["train-classifier", "--config", "DIGITS", "--out", "OUT", "--seed", "-1"], "seed is -1"),
        (["stats", "--dataset", "DIGITS", "--out", "OUT", "--keep_features", "-1"], "keep_features is -1"),
        (["export", "--workdir", "RUN", "--out", "OUT", "--step", "-1"], "step is -1"),
        (["train", "--config", "DIGITS", "--workdir", "OUT", "--profile", "1:" + "9" * 5000], "--profile"),
        (["train", "--config", "DIGITS", "--workdir", "OUT", "--config.train.lr=nan"], "config.train.lr is nan"),
        (["benchmark", "train", "--config", "DIGITS", "--repeats", "-1"], "repeats is -1"),
        (["benchmark", "features", "--config", "DIGITS", "--config.data.image_size=0"], "config.data.image_size is 0"),
        (
            ["tokenizer", "check", "--config", "DIGITS", "--out", "OUT", "--config.data.image_size=-8"],
            "config.data.image_size is -8",
        ),
        (
            ["tokenizer", "check", "--config", "DIGITS", "--out", "OUT", "--config.tokenizer.autoencoder.scale=nan"],
            "config.tokenizer.autoencoder.scale is nan",
        ),
    ],
)
def test_on_the_command_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    claim_workdir("RUN", config_lib.resolve(make_digits()))
    assert cli.main([f"{DIGITS}:debug" if each == "DIGITS" else each for each in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


def test_from_python(tmp_path):
    claim_workdir(tmp_path, config_lib.resolve(make_digits()))
    with pytest.raises(UserError, match="seed is 4294967296"):
        marjax.sample(tmp_path, [0], seed=2**32)
    with pytest.raises(UserError, match="config.train.b1 is nan"):
        marjax.train(config_lib.apply_overrides(make_digits(), {"train.b1": math.nan}), tmp_path)


def test_range():
    share = Range(0.0, BELOW_ONE)
    for value in (0, 0.5, BELOW_ONE, np.float32(0.5)):
        share.check("x", value)
    for value, says in (
        (math.nan, "at least 0"),
        (-1, "at least 0"),
        (1.0, "less than 1"),
        (None, "float"),
        (1j, "float"),
    ):
        with pytest.raises(UserError, match=f"x is .*{says}"):
            share.check("x", value)
    with pytest.raises(UserError, match="x is 10.* 9"):
        integer(2, 9).check("x", 10)
