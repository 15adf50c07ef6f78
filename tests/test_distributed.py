"""Several real processes: how they start, what they agree on, and that they make what one makes."""

import functools
import json
import os
import pathlib
import signal
import socket
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from support.configs import make_autoencoder, make_digits
from support.processes import Run

from marjax import cli, distributed, memory, sharding
from marjax.commands import sample
from marjax.data.latent_cache.read import Latents, read_manifest
from marjax.errors import LOST_PEER, LostPeerError, UserError

ALONE = [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "JAX_COORDINATOR", "JAX_NUM_PROC"))]


@pytest.fixture
def environment(monkeypatch):
    for name in ALONE:
        monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def started(monkeypatch, error=None):
    """What `jax.distributed.initialize` would be told."""
    told = []

    def initialize(**given):
        told.append(given)
        if error is not None:
            raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    distributed.start()
    return {key: value for key, value in told[0].items() if not key.endswith("_seconds")}


def test_the_environment_overrides_what_is_detected(environment, monkeypatch):
    environment(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
    assert started(monkeypatch) == {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}


def test_detection_is_left_to_jax(environment, monkeypatch):
    assert started(monkeypatch) == {}
    assert started(monkeypatch, ValueError("coordinator_address should be defined.")) == {}  # alone


def test_a_step_of_a_slurm_job_with_fewer_tasks_than_the_job(environment, monkeypatch):
    environment(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NODELIST="n[1-2]")
    assert started(monkeypatch) == {"num_processes": 2}


def test_mpi_that_jax_does_not_know(environment, monkeypatch):
    environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1")
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE is 2.*JAX_COORDINATOR_ADDRESS"):
        started(monkeypatch)
    environment(JAX_COORDINATOR_ADDRESS="a:1")
    assert started(monkeypatch) == {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    "variables, says",
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost"}, "'localhost'"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
        ({"MARJAX_HEARTBEAT_SECONDS": "1"}, "^MARJAX_HEARTBEAT_SECONDS is '1'"),
    ],
)
def test_slips(environment, monkeypatch, variables, says):
    environment(**variables)
    with pytest.raises(UserError, match=says):
        started(monkeypatch)


def test_settings_that_are_incomplete(environment, monkeypatch):
    environment(JAX_NUM_PROCESSES="2")
    with pytest.raises(UserError, match=r"coordinator_address should be defined.*JAX_COORDINATOR_ADDRESS"):
        started(monkeypatch, ValueError("coordinator_address should be defined."))


def test_others_that_do_not_come_are_waited_for_anew(environment, monkeypatch, capsys):
    """On GKE, JAX looks for process 0's name for five minutes; a new node may take longer to be there."""
    environment(JAX_COORDINATOR_ADDRESS="a:1")
    monkeypatch.setattr(distributed, "_LOG_AFTER", 0.0)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: time.sleep(0.2) or fail())

    def fail():
        raise RuntimeError("Failed to recognize coordinator address a:1")

    with pytest.raises(LostPeerError, match="processes of this run"):
        distributed.start()
    assert "waiting for the other processes of this run (coordinator_address a:1)" in capsys.readouterr().err
    assert distributed.is_lost_peer(LostPeerError("gone"))
    monkeypatch.setattr(sample, "run", lambda *_: distributed.start())
    assert cli.main(["sample", "--workdir", "x", "--out", "y"]) == LOST_PEER


def test_a_process_alone_takes_sigterm_as_a_notice_once():
    before = signal.getsignal(signal.SIGTERM)
    distributed._listen()
    try:
        assert not distributed.preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert distributed.preempted(2) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        distributed.stop()
    assert signal.getsignal(signal.SIGTERM) is before and not distributed.preempted(3)


def test_which_errors_mean_that_a_peer_is_gone():
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    wrapped = UserError("Saving the checkpoint failed")
    wrapped.__cause__ = ValueError("DEADLINE_EXCEEDED: Barrier timed out")
    assert distributed.is_lost_peer(lost) and distributed.is_lost_peer(wrapped)
    assert not distributed.is_lost_peer(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not distributed.is_lost_peer(UserError("no such file"))


def interleave():
    """Has meshes take the devices of two processes in turn: a slice's links are not in the order of its hosts."""
    make_mesh = jax.make_mesh

    def interleaved(shape, names, *, devices, **more):
        half = len(devices) // 2
        return make_mesh(
            shape,
            names,
            devices=[device for pair in zip(devices[:half], devices[half:], strict=True) for device in pair],
            **more,
        )

    jax.make_mesh = interleaved


def batches_between_processes(index):
    """Ends with 0 if each process has put its own rows where they belong."""
    distributed.start()
    interleave()
    mesh = sharding.make_mesh()
    whole = np.arange(8) * 3
    held = sharding.rows_held(mesh, 8)
    assert held.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]][index], held
    for batch in (sharding.put_batch(whole[held], mesh), sharding.shard_batch(whole, mesh)):
        assert batch.shape == (8,)
        assert multihost_utils.process_allgather(batch, tiled=True).tolist() == whole.tolist()
    return distributed.end(0, None)


def agreements(index):
    """Ends with 0 if everything is as it should be."""
    distributed.start()
    assert distributed.agree("") == ""
    assert distributed.agree("no disk" if index == 1 else "") == "process 1: no disk"
    assert distributed.any_process(index == 1) and not distributed.any_process(False)
    done = []
    distributed.on_first(lambda: done.append(index))
    assert done == ([0] if index == 0 else [])

    def slip():
        raise UserError("taken")

    for _ in range(2):
        try:
            distributed.on_first(slip)
        except UserError as error:
            assert str(error) == "taken"
        else:
            raise AssertionError
    line = distributed.check(sharding.make_mesh(), {"seed": 0})
    assert line.startswith("2 processes, 2 devices (cpu), mesh data 2 x fsdp 1 x tensor 1, marjax "), line
    try:
        distributed.check(sharding.make_mesh(), {"seed": index})
    except UserError as error:
        assert "process 1 of 2 has another config" in str(error)
    else:
        raise AssertionError
    return distributed.end(0, None)


def refused_on_one(index):
    """Ends with 0 if all refuse a program over all that does not fit on process 1, and it alone one of its own."""
    distributed.start()
    memory.available = lambda: 0.0 if index == 1 else float("inf")
    mesh = sharding.make_mesh()
    checked = memory.Checked(jax.jit(lambda x: x[:, None] * x), "the square")

    def refusal(array):
        try:
            jax.block_until_ready(checked(array))
        except UserError as error:
            return str(error)
        return ""

    rows = jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), np.ones(8, np.float32))
    assert refusal(rows).startswith("process 1: the square needs ")
    own = refusal(jax.device_put(np.ones(8, np.float32), jax.local_devices()[0]))
    assert own.startswith("the square needs ") if index == 1 else own == ""
    return distributed.end(0, None)


def test_a_program_that_does_not_fit_on_one_process_is_refused_on_all(tmp_path):
    with Run(tmp_path, refused_on_one, count=2, each=True) as run:
        assert run.wait() == [0, 0], run.said()


def test_rows_are_where_they_belong(tmp_path):
    with Run(tmp_path, batches_between_processes, count=2, devices=2, each=True) as run:
        assert run.wait() == [0, 0], run.said()


def test_agreements(tmp_path):
    with Run(tmp_path, agreements, count=2, each=True) as run:
        assert run.wait() == [0, 0], run.said()


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def behind_a_proxy(proxy):
    """gRPC and the user's storage read the environment: the one must find no proxy, the other what was there."""
    os.environ.update(dict.fromkeys(PROXIES, proxy), no_proxy="own")
    distributed.start()
    assert distributed.any_process(jax.process_index() == 1)
    assert os.environ["https_proxy"] == os.environ["HTTP_PROXY"] == proxy and os.environ["no_proxy"] == "own"
    assert dict(os.environ)["grpc_proxy"] == ""
    return distributed.end(0, None)


def test_processes_meet_behind_a_proxy_that_does_not_answer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as hole:
        with Run(tmp_path, behind_a_proxy, f"http://127.0.0.1:{hole.getsockname()[1]}", count=2) as run:
            assert run.wait(seconds=60) == [0, 0], run.said()
        assert "proxy" not in run.said()
        hole.settimeout(0.0)
        with pytest.raises(BlockingIOError):  # nobody has asked it
            hole.accept()


def last(index, folder, seconds):
    """The first process writes for some seconds after the others are through."""
    distributed.start()
    jax.devices()
    if index == 0:
        (folder / "writes").touch()
        time.sleep(seconds)
    return distributed.end(0, None)


@pytest.mark.slow
def test_who_is_through_waits_for_who_still_writes_but_not_for_the_dead(tmp_path):
    """Longer than a heartbeat, which is 5 s here."""
    with Run(tmp_path, last, tmp_path, 12.0, count=2, each=True, heartbeat=5) as run:
        assert run.wait() == [0, 0], run.said()
    (tmp_path / "writes").unlink()
    with Run(tmp_path, last, tmp_path, 600.0, count=2, each=True, heartbeat=5) as run:
        run.wait_for((tmp_path / "writes").exists)
        time.sleep(1.0)
        run.processes[0].kill()
        codes = run.wait(seconds=60)
    assert codes[0] == -signal.SIGKILL and codes[1] in (LOST_PEER, -signal.SIGABRT), run.said()


def work(folder, train_fields, cache_fields):
    """Trains, saves, samples and, with fields for it, encodes latents in `folder`."""
    from marjax import train
    from marjax.evaluation.across_processes import all_processes
    from marjax.evaluation.samples import SampleSet, SampleSpec
    from marjax.generation.sample import open_sampler, sample
    from marjax.training.latent_cache import cache_latents

    distributed.start()
    if jax.process_count() == 2:
        interleave()
    folder = pathlib.Path(folder)
    save_params(folder, train(make_digits(**train_fields), folder / "run"))
    if jax.process_count() < 4:
        images = sample(folder / "run", np.arange(12) % 10, seed=3)
        if jax.process_index() == 0:
            np.save(folder / "images.npy", images)
    if cache_fields is None:
        return distributed.end(0, None)
    opened = open_sampler(folder / "run", local=True)
    plan = SampleSpec(
        num_images=12, seed=3, num_classes=10, settings={}, weights="ema", step=4, digest="", tokenizer="", batch_size=4
    )
    samples = SampleSet(folder / "samples", plan, all_processes())
    samples.generate(opened.sampler, opened.params)
    cache_latents(make_autoencoder(**cache_fields), folder / "cache", dtype="float32", shard_examples=10)
    return distributed.end(0, None)


def save_params(folder, state):
    params = multihost_utils.process_allgather(state.params, tiled=True)
    if jax.process_index() == 0:
        np.savez(
            folder / "params.npz",
            **{jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)},
        )


# Processes x devices, always four devices. Two processes that evaluate and encode are in the tests of these.
SHAPES = {"one": (1, 4), "two": (2, 2), "four": (4, 1)}


@pytest.fixture(scope="module")
def made(once, autoencoders):
    """A folder for each of SHAPES: a run, its parameters, samples and a latent cache."""
    return once("distributed", functools.partial(make, autoencoders))


def make(autoencoders, folder):
    cache_fields = dict(name="kl", path=str(autoencoders / "kl.safetensors"), data__split="train[:40]")
    for name, (count, devices) in SHAPES.items():
        (folder / name).mkdir()
        with Run(
            folder / name,
            work,
            str(folder / name),
            {"mesh__fsdp": 2},
            None if name == "two" else cache_fields,
            count=count,
            devices=devices,
        ) as run:
            assert run.wait() == [0] * count, run.said()


def lines(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith(("train/", "step"))} for row in rows]


def worst(a, b):
    return max(
        float(np.linalg.norm(np.float64(a[name]) - b[name]) / (np.linalg.norm(np.float64(b[name])) + 1e-12))
        for name in b
        if not name.endswith("['qkv']['bias']")
    )  # the key's: no gradient but rounding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "four"])
def test_processes_make_what_one_makes(made, name):
    """Sums over processes are added in another order than those of one, so training agrees to rounding."""
    assert worst(np.load(made / name / "params.npz"), np.load(made / "one" / "params.npz")) < 1e-4
    for a, b in zip(lines(made / name), lines(made / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_processes_share_samples_and_latents(made):
    one, two = (np.load(made / name / "images.npy") for name in ("one", "two"))
    assert np.abs(one.astype(int) - two).max() <= 1 and len({image.tobytes() for image in one}) == 12
    for folder in ("samples", "cache"):
        a, b = (
            {
                path.relative_to(made / name).as_posix()
                for path in (made / name / folder).rglob("*")
                if path.is_file() and not path.name.startswith(("lock-", "timing-"))
            }
            for name in ("four", "one")
        )
        assert a == b and len(a) >= 4
    for path in (made / "one" / "samples").rglob("batch-*"):
        other = np.load(made / "four" / path.relative_to(made / "one"))
        assert np.abs(other.astype(int) - np.load(path)).max() <= 1
    one, four = (
        Latents(folder, read_manifest(folder), flip=False)
        for folder in (made / "one" / "cache", made / "four" / "cache")
    )
    rng = np.random.default_rng(0)
    assert len(one) == len(four) == 40
    for index in range(40):
        (a, label_a), (b, label_b) = one.read(index, rng), four.read(index, rng)
        assert label_a == label_b and np.abs(a - b).max() < 1e-5


def resume(workdir, fields):
    from marjax import train

    save_params(pathlib.Path(workdir).parent, train(make_digits(**fields), workdir))
    return 0


@pytest.mark.slow
def test_four_processes_are_resumed_by_one_on_another_mesh(made, tmp_path):
    """At the exact position of the data: the losses of the steps that follow are those of the run that went on."""
    import shutil

    shutil.copytree(made / "four" / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    with Run(tmp_path, resume, str(tmp_path / "run"), {"mesh__tensor": 2}, devices=2) as run:
        assert run.wait() == [0], run.said()
    assert "resuming at step 2 of 4" in run.said()
    for a, b in zip(lines(tmp_path), lines(made / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert worst(np.load(tmp_path / "params.npz"), np.load(made / "four" / "params.npz")) < 1e-4
