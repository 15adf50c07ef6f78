"""Programs that do not fit into memory are refused before they run, with what to lower."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support.paths import DIGITS

import marjax
from marjax import config as config_lib
from marjax import host_memory, memory
from marjax.benchmarks.steps import benchmark
from marjax.errors import UserError
from marjax.memory import Batch, Need
from marjax.training.fit import compile_step

TINY = 2**20


def digits(**fields):
    config = config_lib.load(f"{DIGITS}:debug")
    quiet = {
        "log.tensorboard": False,
        "log.progress": False,
        "log.samples_every": 0,
        "train.steps": 1,
        "train.warmup_steps": 1,
    }
    return config_lib.apply_overrides(config, quiet | {key.replace("__", "."): each for key, each in fields.items()})


def limited(monkeypatch, size):
    monkeypatch.setattr(memory, "available", lambda: float(size))


def test_suggested_batch_size_fits():
    def need(images):
        return Need(300.0, 200.0 + 10.0 * images)

    for limit in (510, 599, 600, 1000, 4000):
        text = memory.problem("the step", need(1000), limit, Batch("x.batch_size", 1000, fixed=200.0))
        most = int(re.search(r"x.batch_size from 1000 to (\d+)", text)[1])
        assert sum(need(most)) <= limit < sum(need(2 * most))
        assert not memory.problem("the step", need(most), limit)
    text = memory.problem("the step", need(96), 1000, Batch("x.batch_size", 96, 12, fixed=200.0))
    assert "from 96 to 48" in text
    assert "smaller model" in memory.problem("the step", need(1000), 450, Batch("x.batch_size", 1000, fixed=200.0))
    assert "\n" not in text and "MiB" in text


def test_training_fails_until_the_suggested_batch_size_is_used(tmp_path, monkeypatch):
    limited(monkeypatch, 30 * TINY)
    config = digits(train__batch_size=4096)
    with pytest.raises(UserError, match="config.train.batch_size from 4096 to") as refused:
        marjax.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "checkpoints").exists()
    most = int(re.search(r"to (\d+)", str(refused.value))[1])
    assert 1 <= most < 4096
    parts = int(re.search(r"config.train.accumulate=(\d+)", str(refused.value))[1])
    assert int(marjax.train(digits(train__batch_size=4096, train__accumulate=parts), tmp_path / "run").step) == 1
    limited(monkeypatch, 0.01 * TINY)  # before anything is compiled
    with pytest.raises(UserError, match="smaller model"):
        marjax.train(config, tmp_path / "other")


def test_sampling_and_benchmarks_name_their_field(tmp_path, monkeypatch):
    marjax.train(digits(), tmp_path / "run")
    labels = [0] * 20
    assert len(marjax.sample(tmp_path / "run", labels)) == 20
    limited(monkeypatch, 0.1 * TINY)
    with pytest.raises(UserError, match=r"config.sample.batch_size\) from 20 to \d"):
        marjax.sample(tmp_path / "run", labels)
    for what in ("train", "sample"):
        with pytest.raises(UserError, match=rf"{what}.*{what}.batch_size|smaller model"):
            benchmark(what, digits(), repeats=1)


def test_checked_programs_compile_once_per_shape(monkeypatch):
    traced = []

    def double(x):
        traced.append(x.shape)
        return 2 * x

    checked = memory.Checked(jax.jit(double), "doubling", lambda x: Batch("x", len(x)))
    for size in (2, 3, 2, 3):
        assert checked(jnp.ones(size)).tolist() == [2.0] * size
    assert traced == [(2,), (3,)]
    limited(monkeypatch, 1.0)
    with pytest.raises(UserError, match="doubling"):
        checked(jnp.ones(1000))


def test_initial_weights_are_counted_once(monkeypatch):
    """They are on the devices while the step is checked, and freed before it runs."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    weights = jax.device_put(jnp.ones(TINY, jnp.float32), there)
    abstract = jax.ShapeDtypeStruct(weights.shape, weights.dtype, sharding=there)
    step = jax.jit(lambda state: (state * 2, 0.0), donate_argnums=0)
    limited(monkeypatch, 2 * weights.nbytes - 1)
    with pytest.raises(UserError, match="the training state"):
        compile_step(step, abstract, params=abstract, batch=Batch("x", 1))
    compile_step(step, abstract, params=abstract, batch=Batch("x", 1), weights={"w": weights})


def test_samples_that_do_not_fit_do_not_end_the_run(monkeypatch, tmp_path, capsys):
    problem = memory.problem
    monkeypatch.setattr(
        memory,
        "problem",
        lambda what, need, limit, batch=None: problem(what, need, 0.0 if what == "the sampler" else limit, batch),
    )
    state = marjax.train(digits(train__steps=2, log__samples_every=1), tmp_path / "run")
    assert int(state.step) == 2
    assert "no picture of step 1: the sampler needs" in capsys.readouterr().err


def test_available_memory(tmp_path):
    """Control groups of both versions, the tightest of those around the process."""
    process, root = tmp_path / "cgroup", tmp_path / "fs"
    process.write_text("4:cpu,memory:/a/b\n1:cpu:/x\n0::/job/step\n")
    for folder, limit, used in (("job/step", "max", 0), ("job", "1000", 700)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "memory.max").write_text(limit)
        (root / folder / "memory.current").write_text(str(used))
        (root / folder / "memory.stat").write_text("anon 5\ninactive_file 40\nactive_file 2\n")
    (root / "memory/a/b").mkdir(parents=True)
    for name, text in (("limit_in_bytes", "500"), ("usage_in_bytes", "450"), ("stat", "total_inactive_file 30\n")):
        (root / "memory/a/b" / f"memory.{name}").write_text(text)
    (root / "memory/a/memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert list(host_memory._cgroups(str(root), str(process))) == [500 - 450 + 30, 1000 - 700 + 42]
    assert list(host_memory._cgroups(str(root), str(tmp_path / "missing"))) == []
    assert 2**20 < memory.available() <= host_memory.host_available() + 2**30 < float("inf")


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_one_line_error_under_a_process_limit(tmp_path):
    """At the command line: exit code 2, one line, nothing in the work directory."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30)); "
        "from marjax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            code,
            "train",
            "--config",
            f"{DIGITS}:debug",
            "--workdir",
            tmp_path / "run",
            "--config.train.batch_size=4000000",
            "--config.log.tensorboard=false",
        ],
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("marjax train: error: ") and "config.train.batch_size from 4000000 to" in last
    assert not pathlib.Path(tmp_path / "run" / "config.json").exists()
    available = float(re.search(r"([\d.]+) GiB is available", last)[1])
    assert 1 < available < 12
