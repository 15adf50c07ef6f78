"""Settings of JAX from outside: results stay the same, and the caller keeps his own."""

import contextlib
import os
import shutil
import subprocess
import sys

import flax
import jax
import numpy as np
import pytest
from support.configs import QUICK, flags, make_digits
from support.paths import DIGITS, ROOT

from marjax import numerics, sample, train

# Another value than the pinned one for every setting: the negation, or one of these.
OTHERS = {
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 1,
    "jax_legacy_prng_key": "error",
    "jax_explicit_x64_dtypes": "allow",
    "jax_numpy_dtype_promotion": "strict",
    "jax_default_matmul_precision": "BF16_BF16_F32",
    "jax_optimization_level": "O0",
    "jax_exec_time_optimization_effort": -1.0,
    "jax_memory_fitting_effort": -1.0,
    "jax_memory_fitting_level": "O0",
    "jax_numpy_rank_promotion": "warn",
    "jax_array_garbage_collection_guard": "log",
    **{name: "raise" for name in numerics.PINNED if name.startswith("jax_error_checking")},
    **{name: "disallow_explicit" for name in numerics.PINNED if name.startswith("jax_transfer_guard")},
}
HOSTILE = {name: OTHERS.get(name, not value) for name, value in numerics.PINNED.items()}
SMALL = QUICK | {"train__steps": 2, "log__progress": False, "log__tensorboard": False}


def read(name):
    config = flax.config if name.startswith("flax_") else jax.config
    value = getattr(config, name, jax.config.values.get(name))
    return getattr(value, "name", value).lower() if name == "jax_explicit_x64_dtypes" else value


def known(name):
    return name in jax.config.values or hasattr(flax.config, name)


@contextlib.contextmanager
def hostile():
    """A caller who has set everything else than marjax runs under."""
    before = {name: read(name) for name in HOSTILE if known(name)}
    try:
        for name in before:
            (flax.config if name.startswith("flax_") else jax.config).update(name, HOSTILE[name])
        yield before
    finally:
        for name, value in before.items():
            (flax.config if name.startswith("flax_") else jax.config).update(name, value)


def arrays_of(state, images):
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state))] + [images]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """A work directory of two steps, and its arrays and samples."""
    workdir = tmp_path_factory.mktemp("usual") / "run"
    state = train(make_digits(**SMALL), workdir)
    return workdir, arrays_of(state, sample(workdir, [0, 7, -1], seed=3))


def test_a_caller_s_settings_change_nothing_and_stay(usual, tmp_path):
    with hostile():
        state = train(make_digits(**SMALL), tmp_path / "run")
        images = sample(tmp_path / "run", [0, 7, -1], seed=3)
        assert all(read(name) == value for name, value in HOSTILE.items() if known(name))
    for ours, theirs in zip(arrays_of(state, images), usual[1], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_every_setting_is_pinned_inside_and_restored_outside():
    with hostile() as before:
        with numerics.pinned(), numerics.pinned():
            assert {name: read(name) for name in before} == {name: numerics.PINNED[name] for name in before}
        assert {name: read(name) for name in before} == {name: HOSTILE[name] for name in before}
    assert len(before) > 30


def test_pinning_holds_against_a_caller_s_context_manager():
    with jax.enable_x64(True), jax.default_prng_impl("rbg"):
        with numerics.pinned():
            assert jax.numpy.zeros(2).dtype == np.float32
        assert jax.numpy.zeros(2).dtype == np.float64


def test_keys_have_one_implementation():
    data = jax.random.key_data(numerics.key(5))
    with jax.default_prng_impl("rbg"):
        assert jax.random.key_data(jax.random.key(5)).shape != data.shape  # so that it would show
        for key in (numerics.key(5), numerics.wrap_key(data)):
            assert str(jax.random.key_impl(key)) == numerics.PRNG
            np.testing.assert_array_equal(jax.random.key_data(key), data)


def test_the_command_line_ignores_and_names_them(usual, tmp_path):
    given = {
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_ENABLE_X64": "1",
        "JAX_RANDOM_SEED_OFFSET": "7",
        "JAX_TRANSFER_GUARD": "disallow_explicit",
        "JAX_NO_TRACING": "true",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "FLAX_FIX_RNG_SEPARATOR": "1",
        "JAX_DISABLE_JIT": "no sense",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "marjax",
            "train",
            "--config",
            f"{DIGITS}:debug",
            "--workdir",
            tmp_path / "run",
            *flags(
                {"train__warmup_steps": 1, "checkpoint__every": 2, "log__every": 1, "log__samples_every": 0, **SMALL}
            ),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUMPY_DTYPE_PROMOTION": "standard", **given},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stderr for name in given) and "JAX_NUMPY_DTYPE_PROMOTION" not in done.stderr
    np.testing.assert_array_equal(sample(tmp_path / "run", [0, 7, -1], seed=3), usual[1][-1])


def test_variables_are_dropped_and_those_that_differ_are_named():
    environment = {
        "JAX_ENABLE_X64": "False",
        "JAX_DEBUG_NANS": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "",
        "JAX_NUMPY_RANK_PROMOTION": str(numerics.PINNED["jax_numpy_rank_promotion"]).upper(),
        "FLAX_RETURN_FROZENDICT": "yes",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--a=b",
    }
    assert sorted(numerics.clean_environment(environment)) == ["FLAX_RETURN_FROZENDICT", "JAX_DEBUG_NANS"]
    assert environment == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a=b"}


def test_a_resume_names_compiler_flags_that_have_changed(usual, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(usual[0], tmp_path / "run")
    longer = make_digits(**SMALL | {"train__steps": 3})
    other = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1 --xla_cpu_enable_fast_math"
    monkeypatch.setenv("XLA_FLAGS", other)
    train(longer, workdir)
    told = capsys.readouterr().err
    assert "--xla_cpu_enable_fast_math (was not set, now true)" in told and "device_count (" not in told
    train(longer, workdir)  # of a checkpoint that was saved under these
    assert "fast_math" not in capsys.readouterr().err


@pytest.mark.parametrize("before", [None, [], "x", {}, {"jax": ["0"]}, {"other": {}}, 3])
def test_what_a_checkpoint_says_of_settings_may_be_anything(before):
    told = numerics.differences(before, {"jax": "1"})
    assert "\n" not in told and bool(told) == (isinstance(before, dict) and bool(before))
    assert numerics.differences({"jax": "1"}, {"jax": "1"}) == ""
