"""Checkpoints come back to the bit or not at all: retention, damage, foreign models, failed saves, other meshes."""

import asyncio
import collections
import contextlib
import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src import asyncio_utils

from marjax.checkpoints import manager
from marjax.checkpoints.checksums import checksum
from marjax.checkpoints.manager import TREES, Checkpoints
from marjax.errors import StorageError, UserError

ROOT = pathlib.Path(__file__).parents[1]


def make_state(seed):
    rng = np.random.default_rng(seed)
    params = {
        "block": {"w": jnp.asarray(rng.standard_normal((40, 30)), jnp.float32), "b": jnp.ones(5, jnp.bfloat16) * seed},
        "odd": jnp.asarray([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
        "flags": jnp.asarray([True, False]),
        "bytes": jnp.asarray(rng.integers(0, 256, 7), jnp.uint8),
    }
    trained = {"w": params["block"]["w"], "b": jnp.zeros(3)}
    # NamedTuples within tuples, with empty states and masked places.
    optimizer = optax.chain(optax.clip_by_global_norm(3.0), optax.masked(optax.adamw(1e-3), {"w": True, "b": False}))
    return {
        "params": params,
        "ema": jax.tree.map(lambda x: x[::-1], params),
        "optimizer": optimizer.update(trained, optimizer.init(trained), trained)[1],
    }


def abstract(state, *names):
    trees = {name: state[name] for name in names or TREES}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def same(a, b):
    """Equal to the bit, in the same tree of the same types."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def files(folder):
    """Every file below a folder, with its content."""
    return {p: p.read_bytes() for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()}


def listing(folder):
    return sorted((str(p), p.stat().st_mtime_ns) for p in pathlib.Path(folder).rglob("*"))


@pytest.fixture(scope="module")
def states():
    return {step: make_state(step) for step in (1, 2, 3)}


@pytest.fixture(scope="module")
def template(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "run"
    with Checkpoints(folder) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, **state, meta={"epoch": step / 3, "name": "é"})
    return folder


@pytest.fixture
def run(template, tmp_path):
    """A directory with steps 1, 2 and 3, to be damaged."""
    return pathlib.Path(shutil.copytree(template, tmp_path / "run"))


def test_round_trip_to_the_bit(template, states):
    assert not same(states[2], states[3])
    with Checkpoints(template, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        for step, asked in ((3, None), (1, 1)):
            restored = checkpoints.restore(abstract(states[step]), step=asked)
            assert restored.step == step and restored.meta == {"epoch": step / 3, "name": "é"}
            assert same(restored.items, states[step])
            assert type(restored.items["optimizer"]) is type(states[step]["optimizer"])


def test_some_trees_are_read_without_the_others(run, states):
    shutil.rmtree(run / "3" / "params")
    shutil.rmtree(run / "3" / "optimizer")
    with Checkpoints(run, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract(states[3], "ema"))
        assert restored.step == 3 and list(restored.items) == ["ema"] and same(restored.items["ema"], states[3]["ema"])
        with pytest.raises(ValueError, match="weights"):
            checkpoints.restore({"weights": states[3]["params"]})


def test_retention(tmp_path):
    x = {"w": jnp.ones(2)}
    with Checkpoints(tmp_path / "a", keep=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, params=x, ema=x, optimizer=x, meta={})
        assert checkpoints.steps() == [4, 6, 7]
    assert sorted(os.listdir(tmp_path / "a")) == ["4", "6", "7"]
    for wrong in ({"keep": 0}, {"keep_every": -1}):
        with pytest.raises(UserError, match="expected keep >= 1"):
            Checkpoints(tmp_path / "b", **wrong)


def test_arrays_may_be_donated_right_after_save(tmp_path):
    step_fn = jax.jit(lambda t: jax.tree.map(lambda x: x * 1.5 + 1, t), donate_argnums=0)
    make = jax.jit(lambda: {str(i): jnp.arange(300_000, dtype=jnp.float32) + i for i in range(4)})
    probe = make()
    step_fn(probe)
    assert all(x.is_deleted() for x in probe.values())
    state, expected = {name: make() for name in TREES}, {name: make() for name in TREES}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **state, meta={})
        before = state
        for _ in range(5):
            state = step_fn(state)
        jax.tree.map(lambda x: x.delete(), before)  # On a CPU, jax does not reuse a buffer that is being written out.
        assert not same(state, expected)
        restored = checkpoints.restore(abstract(state))
    assert same(restored.items, expected)


def test_what_cannot_be_saved(tmp_path):
    x = {"w": jnp.ones(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, params=x, ema=x, optimizer=x, meta={})
        for step in (5, 4):
            with pytest.raises(UserError, match=f"step {step}.*has step 5"):
                checkpoints.save(step, params=x, ema=x, optimizer=x, meta={})
        for leaf in (1.0, np.ones(2), jnp.ones((0, 2))):
            with pytest.raises(TypeError, match="ema/w"):
                checkpoints.save(6, params=x, ema={"w": leaf}, optimizer=x, meta={})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(6, params=x, ema=x, optimizer=x, meta={"a": object()})
        assert checkpoints.steps() == [5]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(255 - c for c in content[middle : middle + 4])
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, overwrite, os.remove], ids=["cut", "overwrite", "remove"])
# Reads cut off in mid-air would print a traceback each.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_every_file_is_whole_or_noticed(run, states, damage):
    # No file can be damaged so that something else comes back than was saved.
    outcomes = collections.Counter()
    reasons = []
    with Checkpoints(run, read_only=True) as checkpoints:
        for path, content in files(run / "3").items():
            tree = next((name for name in TREES if name in path.parts), "ema")
            damage(path)
            assert not path.exists() or path.read_bytes() != content
            try:
                restored = checkpoints.restore(abstract(states[3], tree), step=3)
                assert same(restored.items[tree], states[3][tree]) and restored.meta["name"] == "é", path
                outcomes["unharmed"] += 1
            except UserError as error:
                assert "is damaged" in str(error) and "\n" not in str(error)
                reasons.append(str(error))
                outcomes["noticed"] += 1
            path.write_bytes(content)
        assert same(checkpoints.restore(abstract(states[3]), step=3).items, states[3])
    assert outcomes["noticed"] >= 8
    if damage is overwrite:
        # What Orbax alone would have let pass.
        assert any("wrong checksum of params/block/w" in reason for reason in reasons)


def test_overwriting_anywhere_in_the_data_is_noticed(run, states):
    noticed = 0
    data = {p: c for p, c in files(run / "3" / "params").items() if "d" in p.parts}
    assert data
    with Checkpoints(run, read_only=True) as checkpoints:
        for path, content in data.items():
            for start in range(0, len(content), max(1, len(content) // 5)):
                path.write_bytes(content[:start] + bytes([content[start] ^ 0x10]) + content[start + 1 :])
                assert path.read_bytes() != content
                try:
                    restored = checkpoints.restore(abstract(states[3], "params"), step=3)
                    assert same(restored.items["params"], states[3]["params"])
                except UserError:
                    noticed += 1
            path.write_bytes(content)
    assert noticed >= 5


def change_meta(folder):
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["user"]["epoch"] = 7.0
    path.write_text(json.dumps(meta))


def remove_metadata(folder):
    (folder / "_METADATA").unlink()
    (folder / "manifest.ocdbt").unlink()


def largest(folder):
    return max(files(folder), key=lambda p: p.stat().st_size)


DAMAGES = {
    "data cut short": lambda d: cut(largest(d / "optimizer")),
    "data file gone": lambda d: largest(d / "params").unlink(),
    "data overwritten": lambda d: overwrite(largest(d / "ema")),
    "a tree gone": lambda d: shutil.rmtree(d / "ema"),
    "a tree's metadata gone": lambda d: remove_metadata(d / "params"),
    "meta garbled": lambda d: (d / "meta" / "metadata").write_bytes(b"\xff\x00garbage"),
    "meta changed": change_meta,
    "meta gone": lambda d: shutil.rmtree(d / "meta"),
    "everything gone": lambda d: shutil.rmtree(d) or d.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_one_before_a_damaged_one(run, states, caplog, damage):
    before = files(run / "3")
    damage(run / "3")
    assert files(run / "3") != before
    with Checkpoints(run) as checkpoints:
        with caplog.at_level(logging.WARNING):
            restored = checkpoints.restore(abstract(states[2]))
        assert restored.step == 2 and same(restored.items, states[2]) and restored.meta["epoch"] == 2 / 3
        ours = [r.getMessage() for r in caplog.records if r.name == manager.__name__]
        assert len(ours) == 2
        assert "/3 is damaged (" in ours[0] and ours[0].endswith("trying step 2") and "-damaged/3" in ours[1]
        # Training goes on from 2 and saves 3 again.
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, **states[3], meta={})
        again = checkpoints.restore(abstract(states[3]))
        assert again.step == 3 and same(again.items, states[3])
        assert checkpoints.steps() == [1, 2, 3]
    assert os.listdir(f"{run}-damaged") == ["3"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("UNAVAILABLE: Error opening driver [gcs_key_value_store]: CURL error 7"),
        PermissionError(13, "denied"),
        OSError(24, "Too many open files"),
        ValueError("RESOURCE_EXHAUSTED: no [os_error_code='24']"),
        TimeoutError(),
    ],
)
@pytest.mark.parametrize(
    ("handler", "part"), [("StandardCheckpointHandler", "params"), ("JsonCheckpointHandler", "meta")]
)
def test_one_that_is_out_of_reach_is_not_taken_for_damaged(run, states, monkeypatch, handler, part, error):
    before = files(run)
    with Checkpoints(run) as checkpoints:
        restore = getattr(manager.ocp, handler).restore

        def fail(self, path, *args, **more):
            if path.name == part:
                raise ValueError("Reading failed") from error
            return restore(self, path, *args, **more)

        monkeypatch.setattr(getattr(manager.ocp, handler), "restore", fail)
        with pytest.raises(StorageError, match=rf"^cannot read {part}: .*once it can be read"):
            checkpoints.restore(abstract(states[3]))
    assert files(run) == before and not os.path.exists(f"{run}-damaged")


def test_commit_markers_are_not_needed_on_a_disk(run, states, caplog):
    markers = [p for p in files(run / "3") if p.name in ("commit_success.txt", "_CHECKPOINT_METADATA")]
    assert markers
    for path in markers:
        path.unlink()
    with Checkpoints(run) as checkpoints:
        restored = checkpoints.restore(abstract(states[3]))
    assert restored.step == 3 and same(restored.items, states[3])


def test_two_damaged_and_moved_aside_twice(run, states):
    with Checkpoints(run, keep=3) as checkpoints:
        for names in (["2", "3"], ["2", "2.1", "3", "3.1"]):
            for step in (2, 3):
                change_meta(run / str(step))
            assert checkpoints.restore(abstract(states[1])).step == 1
            assert sorted(os.listdir(f"{run}-damaged")) == names
            for step in (2, 3):
                checkpoints.save(step, **states[step], meta={"epoch": 0})
            # The damaged ones count nothing towards `keep`.
            assert checkpoints.steps() == [1, 2, 3]


def test_all_damaged_and_none_there(run, states, tmp_path, caplog):
    for step in (1, 2, 3):
        change_meta(run / str(step))
    before = listing(tmp_path)
    says = r"all .* damaged \(steps \[1, 2, 3\]; step 3: wrong checksum of meta\)"
    with Checkpoints(run) as checkpoints, pytest.raises(UserError, match=says):
        checkpoints.restore(abstract(states[1]))
    assert caplog.text.count("is damaged") == 3
    assert listing(tmp_path) == before
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(abstract(states[1])) is None


def test_an_explicit_step(run, states):
    cut(largest(run / "2" / "params"))
    before = listing(run.parent)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore(abstract(states[1]), step=1).step == 1
        with pytest.raises(UserError, match=r"/2 is damaged \(cannot read params.*\[1, 3\]"):
            checkpoints.restore(abstract(states[2]), step=2)
        with pytest.raises(UserError, match=r"step 9 .*steps \[1, 2, 3\]"):
            checkpoints.restore(abstract(states[2]), step=9)
    assert listing(run.parent) == before
    with pytest.raises(UserError, match="step 9"), Checkpoints(run / "new") as checkpoints:
        checkpoints.restore(abstract(states[2]), step=9)


def test_another_model_is_not_damage(run, states, caplog):
    before = listing(run.parent)
    shape, dtype, names = (abstract(states[3], "params") for _ in range(3))
    shape["params"]["block"]["w"] = jax.ShapeDtypeStruct((30, 40), jnp.float32)
    dtype["params"]["block"]["w"] = jax.ShapeDtypeStruct((40, 30), jnp.bfloat16)
    names["params"]["head"] = names["params"].pop("odd")
    expected = {
        "params/block/w: float32[40,30] in the checkpoint, expected float32[30,40]": shape,
        "params/block/w: float32[40,30] in the checkpoint, expected bfloat16[40,30]": dtype,
        "params/head: nothing in the checkpoint, expected float32[4]; "
        "params/odd: float32[4] in the checkpoint, expected nothing": names,
    }
    with Checkpoints(run) as checkpoints:
        for text, wanted in expected.items():
            for step in (None, 3):
                with pytest.raises(UserError) as caught:
                    checkpoints.restore(wanted, step=step)
                assert text in str(caught.value)
                assert "--config.model" in str(caught.value)
        many = {"params": {f"p{i}": jax.ShapeDtypeStruct((2,), jnp.float32) for i in range(20)}}
        with pytest.raises(UserError, match="and 22 more"):
            checkpoints.restore(many)
    assert not caplog.records and listing(run.parent) == before


def test_a_newer_format(run, states):
    path = run / "3" / "meta" / "metadata"
    body = json.loads(path.read_text())
    del body["digest"]
    body["format"] += 1
    path.write_text(json.dumps(body | {"digest": manager._digest(body)}))
    with Checkpoints(run) as checkpoints, pytest.raises(UserError, match="has format 2, expected 1"):
        checkpoints.restore(abstract(states[3]))


@pytest.mark.parametrize("step", [None, 3])
def test_a_later_format_is_no_damage(run, states, step):
    """Whatever else it says: it is left where it is."""
    (run / "3" / "meta" / "metadata").write_text('{"format": 2, "arrays": "elsewhere"}')
    before = files(run)
    with Checkpoints(run) as checkpoints:
        for read in (lambda: checkpoints.restore(abstract(states[3]), step), lambda: checkpoints.trees(step)):
            with pytest.raises(UserError, match="3 has format 2, expected 1"):
                read()
    assert files(run) == before and not os.path.exists(f"{run}-damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": []},
        {"arrays": {"params/a": 3}},
        {"arrays": {"params/a": {"shape": "x", "dtype": 1}}},
        {"user": None},
        {"format": "1"},
        {"format": None},
        "[]",
        "3",
        "[" * 100_000,
        "\0",
        '{"format": ' + "9" * 5000 + "}",
    ],
)
def test_metadata_of_another_shape_is_damage(run, states, caplog, change):
    path = run / "3" / "meta" / "metadata"
    body = json.loads(path.read_text())
    del body["digest"]
    if not isinstance(change, str):
        body |= change
        change = json.dumps(body | {"digest": manager._digest(body)})
    path.write_text(change)
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.trees() == list(TREES)
        assert checkpoints.restore(abstract(states[2])).step == 2
    assert "3 is damaged" in caplog.text


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"commit_timestamp_nsecs": "x"}', '{"init_timestamp_nsecs": {}}', "[" * 9000]
)
def test_times_that_cannot_be_read_are_one_line(run, states, text):
    """Orbax sorts by them, and raises what it finds."""
    path = run / "3" / "_CHECKPOINT_METADATA"
    path.write_text(text)
    with contextlib.suppress(UserError), Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(states[3])).step == 3
    path.unlink()
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(states[3])).step == 3


@pytest.mark.parametrize(
    "replace",
    [
        os.mkfifo,
        lambda path: os.symlink("/dev/zero", path),
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 40),
    ],
)
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "meta/metadata", "ema/_METADATA", "ema/manifest.ocdbt"])
def test_pipes_devices_and_endless_files_are_not_read(run, states, name, replace):
    """Orbax would wait for ever, or take all memory."""
    path = run / "3" / name
    path.unlink()
    replace(path)
    with pytest.raises(UserError, match=path.name), Checkpoints(run, read_only=True) as checkpoints:
        checkpoints.restore(abstract(states[3], "ema"), step=3)


def test_read_only_changes_nothing(run, states, tmp_path, caplog):
    overwrite(largest(run / "3" / "params"))
    before = listing(tmp_path)
    with Checkpoints(run, read_only=True, keep=1) as reader:
        assert reader.restore(abstract(states[2])).step == 2
        assert "/3 is damaged" in caplog.text
        with pytest.raises(UserError, match="read_only"):
            reader.save(4, **states[3], meta={})
        with Checkpoints(tmp_path / "missing" / "run", read_only=True) as nothing:
            assert nothing.steps() == [] and nothing.restore(abstract(states[2])) is None
        assert listing(tmp_path) == before
        # A reader sees what the run that writes adds later.
        with Checkpoints(run, keep=4) as writer:
            writer.save(4, **states[3], meta={})
        assert reader.steps() == [1, 2, 3, 4] and reader.restore(abstract(states[3])).step == 4


def small_files():
    """Lets no file grow beyond 150 kB, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def limits():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("ending", ["save", "wait", "block"])
def test_a_failed_save_surfaces_once(tmp_path, caplog, limits, ending):
    x = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(100_000), jnp.float32)}
    trees = dict.fromkeys(TREES, x)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(1, **trees, meta={})
    checkpoints.wait()
    small_files()
    checkpoints.save(2, **trees, meta={})
    with pytest.raises(UserError, match="checkpoint of step 2 in .* failed: File too large") as caught:
        if ending == "save":
            checkpoints.save(3, **trees, meta={})
        elif ending == "block":
            with checkpoints:
                pass
        else:
            checkpoints.wait()
    assert "\n" not in str(caught.value)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    if ending == "block":
        checkpoints = Checkpoints(tmp_path / "run", keep=1)
    # The one before is still there, although it was to go once 2 was saved.
    assert checkpoints.steps() == [1]
    checkpoints.save(2, **trees, meta={})
    assert checkpoints.steps() == [2]
    checkpoints.close()


def test_an_error_in_the_block_matters_more_than_a_failed_save(tmp_path, caplog, limits):
    x = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(100_000), jnp.float32)}
    with pytest.raises(KeyError, match="first"), Checkpoints(tmp_path) as checkpoints:
        small_files()
        checkpoints.save(2, params=x, ema=x, optimizer=x, meta={})
        raise KeyError("first")
    assert "checkpoint of step 2" in caplog.text


def test_a_directory_that_cannot_be_written(tmp_path):
    x = {"w": jnp.ones(2)}
    folder = tmp_path / "run"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, params=x, ema=x, optimizer=x, meta={})
        checkpoints.wait()
        folder.rename(tmp_path / "away")
        folder.write_text("in the way")
        with pytest.raises(UserError, match="step 2 in .* failed: .*Not a directory"):
            checkpoints.save(2, params=x, ema=x, optimizer=x, meta={})
        with pytest.raises(UserError, match="below .*Not a directory"):
            Checkpoints(folder / "below")
        folder.unlink()
        (tmp_path / "away").rename(folder)
        checkpoints.save(2, params=x, ema=x, optimizer=x, meta={})
        assert checkpoints.steps() == [1, 2]


def in_subprocess(code, *arguments, devices=1):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("limit", "says"), [("FSIZE", "File too large"), ("NOFILE", "Too many open files")])
def test_a_failed_save_prints_nothing_but_its_error(tmp_path, limit, says):
    """Orbax and asyncio print hundreds of lines about a full disk, or about too few descriptors."""
    failed = in_subprocess(
        """
        import gc, os, resource, sys
        import jax.numpy as jnp
        import numpy as np
        from marjax import failures
        from marjax.checkpoints.manager import Checkpoints
        failures.quiet_interpreter()
        x = {f"w{i}": jnp.asarray(np.random.default_rng(0).standard_normal(50_000), jnp.float32) for i in range(4)}
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, params=x, ema=x, optimizer=x, meta={})
        checkpoints.wait()
        kind = getattr(resource, f"RLIMIT_{sys.argv[2]}")
        least = 150_000 if sys.argv[2] == "FSIZE" else len(os.listdir("/proc/self/fd")) + 4
        resource.setrlimit(kind, (least, resource.getrlimit(kind)[1]))
        try:
            checkpoints.save(2, params=x, ema=x, optimizer=x, meta={})
            checkpoints.wait()
        except ValueError as error:
            print(error)
        gc.collect()
        """,
        tmp_path / "run",
        limit,
    )
    assert says in failed.stdout and len(failed.stdout.splitlines()) == 1
    assert failed.returncode == 0 and "Traceback" not in failed.stderr and "Event loop" not in failed.stderr


def test_orbax_is_changed_only_while_checkpoints_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(manager.QuietOrbax, "_num_open", 0)  # whatever other tests leave open
    first, second = Checkpoints(tmp_path / "1"), Checkpoints(tmp_path / "2")
    first.close()
    assert asyncio_utils.asyncio is not asyncio
    second.close()
    assert asyncio_utils.asyncio is asyncio


def test_killed_in_the_middle_of_a_save(tmp_path):
    killed = in_subprocess(
        """
        import os, signal, sys
        import jax.numpy as jnp
        from marjax.checkpoints.manager import Checkpoints
        x = {"w": jnp.ones((10, 10))}
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, params=x, ema=x, optimizer=x, meta={})
        checkpoints.wait()
        # Everything is written, and the directory is about to get its final name.
        os.rename = os.replace = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(2, params=x, ema=x, optimizer=x, meta={})
        checkpoints.wait()
        """,
        tmp_path / "run",
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [p for p in os.listdir(tmp_path / "run") if p != "1"]
    assert left and "2" not in left, left
    shutil.copytree(tmp_path / "run" / left[0], tmp_path / "run" / left[0].replace("2", "7"))
    x = {"w": jnp.ones((10, 10))}
    state = dict.fromkeys(TREES, x)
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(state)).step == 1
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(abstract(state)).step == 1
        checkpoints.save(2, **state, meta={})
        assert checkpoints.restore(abstract(state)).step == 2
    # What killed saves left is gone, whatever their step.
    assert sorted(os.listdir(tmp_path / "run")) == ["1", "2"]


def test_other_meshes(tmp_path):
    # Written on one device, read and written again on meshes of eight, and read here on one.
    done = in_subprocess(
        """
        import json, sys
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from marjax.checkpoints.checksums import checksum
        from marjax.checkpoints.manager import Checkpoints

        w = jnp.arange(40 * 32.0).reshape(40, 32) / 7
        state = {"w": w, "h": w[:, :3].astype(jnp.bfloat16), "n": jnp.int32(3)}
        sums = [checksum(state)]
        with Checkpoints(sys.argv[1]) as checkpoints:
            for step, shape in ((1, (2, 4)), (2, (8, 1)), (3, None)):
                checkpoints.save(step, params=state, ema=state, optimizer=state, meta={})
                if not shape:
                    break
                mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
                specs = {"w": P("data", "fsdp"), "h": P(("data", "fsdp")), "n": P()}
                target = {
                    k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[k]))
                    for k, x in state.items()
                }
                state = checkpoints.restore({"params": target}).items["params"]
                assert state["w"].addressable_shards[0].data.shape == (40 // shape[0], 32 // shape[1])
                assert len(state["w"].sharding.device_set) == len(state["n"].sharding.device_set) == 8
                sums.append(checksum(state))
        print(json.dumps(sums))
        """,
        tmp_path / "run",
        devices=8,
    )
    assert done.returncode == 0, done.stderr
    sums = json.loads(done.stdout.splitlines()[-1])
    w = jnp.arange(40 * 32.0).reshape(40, 32) / 7
    state = {"w": w, "h": w[:, :3].astype(jnp.bfloat16), "n": jnp.int32(3)}
    assert sums == [checksum(state)] * 3
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract(dict.fromkeys(TREES, state)))
    assert restored.step == 3 and all(same(tree, state) for tree in restored.items.values())


def test_a_checkpoint_of_weights_alone(tmp_path, states, run):
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(0, ema=states[1]["ema"], meta={"from": "elsewhere"})
        assert checkpoints.trees() == checkpoints.trees(0) == ["ema"]
        restored = checkpoints.restore(abstract(states[1], "ema"))
        assert restored.step == 0 and same(restored.items["ema"], states[1]["ema"])
        with pytest.raises(UserError, match="only ema, not params and optimizer.*--init_from"):
            checkpoints.restore(abstract(states[1]))
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.trees() == checkpoints.trees(1) == list(TREES)
        shutil.rmtree(run / "3" / "ema")  # damage does not change what it should have
        (run / "2" / "meta" / "metadata").write_text("{}")
        assert checkpoints.trees() == checkpoints.trees(3) == checkpoints.trees(2) == list(TREES)
