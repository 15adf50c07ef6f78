import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from marjax import config as config_lib
from marjax.config.resolve import frozen
from marjax.data import worker_processes
from marjax.data.config import DataConfig
from marjax.data.pipeline import Batch, Batches
from marjax.data.sources import open_source
from marjax.errors import UserError


def data_config(**changes: Any) -> DataConfig:
    return frozen(config_lib.base().data, DataConfig, **{"num_classes": 10, "flip": True} | changes)


def take(count: int, data: DataConfig, batch_size: int = 32, seed: int = 0, **more: Any) -> list[Batch]:
    with Batches(data, batch_size, seed, **more) as batches:
        return list(itertools.islice(batches, count))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left["image"], right["image"])
        np.testing.assert_array_equal(left["label"], right["label"])


def images(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch["image"] for batch in batches])


def keys(batches: list[Batch]) -> list[bytes]:
    return [image.tobytes() for image in images(batches)]


def test_batches_are_arrays_of_fixed_shape() -> None:
    for batch in take(3, data_config(image_size=12, channels=3)):
        assert batch["image"].shape == (32, 12, 12, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (32,) and batch["label"].dtype == np.int32


@pytest.mark.parametrize("workers", [0, 1])
def test_the_devices_of_the_host_can_use_images_where_they_are(workers: int) -> None:
    """Without a copy, which takes longer than all the rest of a step that the host does."""
    for batch in take(3, data_config(workers=workers)):
        rows = batch["image"]
        array = jax.device_put(rows)
        assert array.unsafe_buffer_pointer() == rows.ctypes.data


def test_images_keep_their_labels() -> None:
    source = open_source(data_config())
    labels = {source[i]["image"].tobytes(): source[i]["label"] for i in range(len(source))}
    for batch in take(4, data_config(flip=False)):
        assert [labels[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()


def test_the_order_of_a_seed_never_changes() -> None:
    # Runs are resumed by step number alone. If this moves, they silently see other data after an upgrade: undo the
    # change, or announce that runs cannot be resumed across it.
    first = take(1, data_config(), batch_size=16)[0]
    assert first["label"].tolist() == [2, 4, 5, 4, 8, 2, 0, 6, 3, 3, 2, 6, 7, 8, 0, 3]
    straight = take(1, data_config(flip=False), batch_size=16)[0]
    flips = [not np.array_equal(a, b) for a, b in zip(first["image"], straight["image"], strict=True)]
    assert "".join("-F"[flip] for flip in flips) == "-FFFF-FF--F-FFFF"


def test_flips_are_half_keyed_by_position_and_only_on_request() -> None:
    def flips(seed: int) -> np.ndarray:
        straight, flipped = take(20, data_config(flip=False), seed=seed), take(20, data_config(), seed=seed)
        a, b = images(straight), images(flipped)
        kept, mirrored = (a == b).all((1, 2, 3)), (a[:, :, ::-1] == b).all((1, 2, 3))
        assert (kept | mirrored).all()
        np.testing.assert_array_equal(straight[7]["label"], flipped[7]["label"])
        return mirrored

    once, again, other = flips(0), flips(0), flips(1)
    np.testing.assert_array_equal(once, again)
    assert 0.4 < once.mean() < 0.6 and 0.4 < (once == other).mean() < 0.6
    # One image is flipped in some epochs and not in others.
    single = images(take(40, data_config(split="train[:1]"), batch_size=1))
    assert len({image.tobytes() for image in single}) == 2


def test_seeds_differ() -> None:
    assert keys(take(2, data_config())) == keys(take(2, data_config()))
    assert keys(take(2, data_config(flip=False))) != keys(take(2, data_config(flip=False), seed=1))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_and_their_place_in_the_mesh_do_not_change_a_global_batch(hosts: int) -> None:
    data = data_config(split="train[:100]")
    shuffled = np.random.default_rng(0).permutation(32)
    for order in (np.arange(32), shuffled):
        held = [np.sort(rows) for rows in np.split(order, hosts)]
        parts = [take(8, data, rows=rows) for rows in held]
        assert parts[0][0]["image"].shape == (32 // hosts, 8, 8, 1)
        assert keys(parts[0]) != keys(parts[1])
        there = np.argsort(np.concatenate(held))
        joined: list[Batch] = [
            {key: np.concatenate([part[key] for part in step])[there] for key in ("image", "label")}
            for step in zip(*parts, strict=True)
        ]
        assert_same(joined, take(8, data))


def test_the_number_of_threads_does_not_change_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_config(source="tfds:cifar10", channels=3, image_size=16)
    with tfds.testing.mock_data(num_examples=30):
        taken = []
        for cores in (1, 6):
            monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
            taken.append(take(12, data, batch_size=8))
    assert_same(*taken)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_change_a_batch(workers: int) -> None:
    before = set(multiprocessing.active_children())
    assert_same(
        take(7, data_config(split="train[:100]", workers=workers), start_step=2),
        take(7, data_config(split="train[:100]"), start_step=2),
    )
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("skipped", [1, 3, 4, 50])
def test_starting_later_is_skipping(skipped: int) -> None:
    # An epoch of 100 ends within the fourth batch of 32.
    data = data_config(split="train[:100]")
    whole = take(skipped + 4, data)
    assert_same(take(4, data, start_step=skipped), whole[skipped:])
    assert keys(whole[:4]) != keys(whole[skipped:])


def test_every_epoch_has_every_example_once() -> None:
    data = data_config(split="train[:100]", flip=False)
    source = open_source(data)
    everything = {source[i]["image"].tobytes() for i in range(100)}
    assert len(everything) == 100
    seen = keys(take(25, data))
    epochs = [seen[start : start + 100] for start in range(0, 800, 100)]
    assert all(set(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_a_batch_may_be_larger_than_the_data() -> None:
    seen = keys(take(2, data_config(split="train[:5]", flip=False), batch_size=12))
    assert [len(set(seen[start : start + 5])) for start in (0, 5, 10, 15)] == [5, 5, 5, 5]


def test_without_training_one_pass_in_order_and_no_flips() -> None:
    data = data_config(split="train[:70]")
    source = open_source(data)
    with Batches(data, 32, 0, train=False) as batches:
        assert batches.num_examples == 70 and batches.num_batches == 3
        read = list(batches)
    assert len(read) == 3
    order = list(range(70)) + list(range(26))
    assert keys(read) == [source[i]["image"].tobytes() for i in order]
    assert_same(take(9, data, train=False, start_step=2), read[2:])
    assert take(9, data, train=False, start_step=3) == []
    with Batches(data, 32, 0) as batches:
        assert batches.num_batches is None


@pytest.mark.parametrize(
    "arguments, changes, words",
    [
        ({"batch_size": 0}, {}, "batch_size=0"),
        ({"rows": np.array([3, 8])}, {}, "of a batch of 8: expected ascending"),
        ({"rows": np.array([3, 3])}, {}, "of a batch of 8: expected ascending"),
        ({"seed": -1}, {}, "seed=-1"),
        ({"start_step": -1}, {}, "start_step=-1"),
        ({}, {"workers": -1}, "data.workers=-1"),
        ({}, {"channels": 4}, "data.channels=4"),
        ({}, {"source": "digit"}, "data.source='digit'"),
    ],
)
def test_slips_are_refused(arguments: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Batches(data_config(**changes), **({"batch_size": 8, "seed": 0} | arguments))
    assert "\n" not in str(caught.value)


def test_little_shared_memory_is_named_before_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's 64 MiB: a bus error would end the workers."""
    monkeypatch.setattr(worker_processes, "shared_memory_free", lambda: 64 * 2**20)
    big = data_config(image_size=256, channels=3, workers=8)
    with pytest.raises(UserError, match=r"^/dev/shm .*--shm-size=1g.*data\.workers=0"):
        Batches(big, 32, 0)
    assert not multiprocessing.active_children()
    Batches(data_config(image_size=256, channels=3, workers=0), 32, 0).close()
    batch = 32 * 256 * 256 * 3
    worker_processes.check_shared_memory(batch, 1)
    worker_processes.check_shared_memory(batch // 4, 8)  # of four hosts
    monkeypatch.setattr(worker_processes, "shared_memory_free", lambda: None)  # macOS
    worker_processes.check_shared_memory(batch, 8)


def test_shared_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_processes, "SHARED_MEMORY", "/there/is/none")
    assert worker_processes.shared_memory_free() is None
    monkeypatch.setattr(worker_processes, "SHARED_MEMORY", os.curdir)
    assert worker_processes.shared_memory_free() is not None


@pytest.mark.parametrize("code, word", [(-7, "/dev/shm"), (-9, "memory")])
def test_a_worker_that_was_killed_is_one_line(code: int, word: str) -> None:
    error = RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. Search the logs above.")
    assert word in str(worker_processes.explain_death(error)) and "data.workers" in str(
        worker_processes.explain_death(error)
    )
    assert worker_processes.explain_death(RuntimeError("something else")) is None


def test_closing_ends_the_batches() -> None:
    batches = Batches(data_config(), 8, 0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_batches_that_nobody_closes_leave_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    batches = Batches(data_config(workers=1), 8, 0)
    assert os.environ["PYTHONSAFEPATH"] == "1"
    del batches
    gc.collect()
    assert "PYTHONSAFEPATH" not in os.environ


def test_importing_the_room_imports_neither_tensorflow_nor_tfds() -> None:
    script = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("tensorflow", "tensorflow_datasets", "sklearn"):
            print("tried", name)

sys.meta_path.insert(0, Watch())
import marjax.data.pipeline
print("done")
import sklearn
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["done", "tried sklearn"]
