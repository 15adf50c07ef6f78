"""Metrics are independent of the number of processes, of blocks and of the order of rows.

Processes are threads that meet at every gather, and once two real processes. Legend: N rows, F features.
"""

import json

import numpy as np
import pytest
from support.hosts import on_hosts
from support.networks import Network
from support.processes import Run

from marjax import distributed
from marjax.evaluation import across_processes as hosts_lib
from marjax.evaluation.across_processes import Processes, all_processes
from marjax.evaluation.metrics import precision_recall as precision_recall_lib
from marjax.evaluation.metrics.frechet import Moments, frechet_distance
from marjax.evaluation.metrics.inception_score import ScoreSums
from marjax.evaluation.metrics.kernel_distance import kernel_distance
from marjax.evaluation.metrics.precision_recall import precision_recall
from marjax.evaluation.statistics import compute_statistics

N, F, K = 250, 12, 5


def sets():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(F, F))
    real = (rng.normal(size=(N, F)) @ mix).astype(np.float32)
    generated = (rng.normal(size=(N, F)) @ mix * 1.1 + 0.4).astype(np.float32)
    return real, generated, (rng.normal(size=(N, K)) * 2).astype(np.float32)


def cut(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def evaluate(hosts=None, *, real, generated, logits, size=50, order=None):
    """All metrics; process b % count has batch b of the generated rows, in this order."""
    hosts = hosts or Processes()
    order = np.arange(N) if order is None else order
    moments, score = [Moments(F), Moments(F)], ScoreSums(N, K)
    batches = cut(order, size)
    for batch in hosts.share(len(batches)):
        moments[0].add(real[batches[batch]])
        moments[1].add(generated[batches[batch]])
        score.add(batches[batch], logits[batches[batch]])
    a, b = (each.merged(hosts).gaussian() for each in moments)
    blocks = cut(real[order], size), cut(generated[order], size)
    return {
        "fid": frechet_distance(a, b),
        "is": score.merged(hosts).result(),
        "precision": precision_recall(*blocks, processes=hosts),
        "kid": kernel_distance(*blocks, subsets=5, size=N, processes=hosts),
    }


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(precision_recall_lib, "_TALL", 60)
    monkeypatch.setattr(precision_recall_lib, "_WIDE", 40)
    monkeypatch.setattr(hosts_lib, "_AT_A_TIME", 100)


def same(found, expected):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


def test_processes_batches_and_the_order_of_rows_change_nothing(small_tiles):
    real, generated, logits = sets()
    data = {"real": real, "generated": generated, "logits": logits}
    whole = evaluate(**data)
    assert 0 < whole["precision"].precision < 1 and whole["fid"] > 0.1 and whole["is"].mean > 1.1
    for count in (2, 4):
        same(on_hosts(count, lambda hosts: evaluate(hosts, **data)), whole)
    for size in (1, 7, N):  # with 4 processes and one batch, three have nothing
        same(on_hosts(4, lambda hosts, size=size: evaluate(hosts, size=size, **data)), whole)
    same(evaluate(order=np.random.default_rng(1).permutation(N), **data), whole)
    # Every metric depends on every row.
    other = evaluate(
        **data
        | {
            "generated": np.concatenate([generated[:-1], generated[:1] + 9]),
            "logits": np.concatenate([logits[:-1], -logits[-1:]]),
        }
    )
    assert all(other[name] != pytest.approx(value, rel=1e-6) for name, value in whole.items())


def test_one_set_twice():
    real, _, logits = sets()
    found = evaluate(real=real, generated=real, logits=logits, size=7, order=np.arange(N))
    assert found["fid"] == pytest.approx(0.0, abs=1e-9) and found["precision"] == (1.0, 1.0)
    assert found["kid"].mean < 0.0


class OnDisk:
    """Blocks that count how often they are loaded."""

    def __init__(self, blocks):
        self.blocks, self.looks = blocks, 0

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        block = self.blocks[index]
        self.looks += 1
        return block.copy()


def test_blocks_are_loaded_once_per_pass(small_tiles):
    real, generated, _ = sets()
    blocks = OnDisk(cut(real, 50)), OnDisk(cut(generated, 50))
    whole = precision_recall(*blocks)
    assert whole == precision_recall([real], [generated])
    # Shapes, the origin, then for each of five tall tiles of 60 once, and where a tile ends amid a block once more.
    assert all(len(each) * 6 < each.looks < len(each) * 20 for each in blocks)
    blocks = OnDisk(cut(real, 50)), OnDisk(cut(generated, 50))
    assert kernel_distance(*blocks, subsets=8, size=40) == kernel_distance([real], [generated], subsets=8, size=40)
    assert all(each.looks == 2 * len(each) for each in blocks)


def test_shares_cover_all_work_once():
    for count in (1, 2, 4):
        shares = [Processes(index, count).share(11) for index in range(count)]
        assert sorted(piece for share in shares for piece in share) == list(range(11))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all_processes() == Processes(0, 1)
    with pytest.raises(ValueError, match="float32: expected float64 or int64"):
        Processes().allgather(np.zeros(3, np.float32))
    assert Processes().allgather(np.arange(3)).tolist() == [[0, 1, 2]]


def made(hosts=None, size=50, total=40, keep=10, seed=0):
    hosts = hosts or Processes()
    images = np.random.default_rng(2).integers(0, 256, (total, 4, 4, 3), np.uint8)
    batches = cut(np.arange(total), size)
    found = compute_statistics(
        [(batches[b], images[batches[b]]) for b in hosts.share(len(batches))],
        total,
        Network(),
        keep_features=keep,
        seed=seed,
        processes=hosts,
    )
    numbers = np.concatenate(
        [found.gaussian.mean, found.gaussian.cov.ravel(), found.spatial.mean, found.spatial.cov.ravel()]
    )
    return numbers.tolist(), found.features.tolist(), found.gaussian.count


def test_statistics_by_any_number_of_processes(small_tiles):
    numbers, features, count = made()
    assert count == 40 and len(features) == 10
    for hosts, size in ((2, 50), (2, 7), (4, 3)):
        found = on_hosts(hosts, lambda hosts, size=size: made(hosts, size))
        assert found[0] == pytest.approx(numbers, rel=1e-11, abs=1e-12) and found[1:] == (features, 40)
    assert made(seed=1)[1] != features and len(made(keep=99)[1]) == 40


def measure(index, folder):
    """Runs in one of two processes."""
    distributed.start()
    hosts = all_processes()
    assert hosts == Processes(index, 2)
    mine = np.array([[np.pi, 1e300], [5e-324, -0.0]]) * (1 - 2 * index)  # needs all 64 bits
    both = hosts.allgather(mine)
    assert both.shape == (2, 2, 2) and both[index].tobytes() == mine.tobytes() and (both[0] == -both[1]).all()
    assert hosts.sum(np.array([2**40 + index])).tolist() == [2**41 + 1]
    real, generated, logits = sets()
    found = [evaluate(hosts, real=real, generated=generated, logits=logits), made(hosts)]
    (folder / f"{index}.json").write_text(json.dumps(found))
    return distributed.end(0, None)


def test_two_processes(tmp_path):
    with Run(tmp_path, measure, tmp_path, count=2, devices=2, each=True) as run:
        assert run.wait() == [0, 0], run.said()
    said = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)]
    assert said[0] == said[1]
    real, generated, logits = sets()
    whole, (numbers, features, count) = evaluate(real=real, generated=generated, logits=logits), made()
    metrics, reference = said[0]
    assert metrics["fid"] == pytest.approx(whole["fid"], rel=1e-10)
    for name in ("is", "precision", "kid"):
        assert metrics[name] == pytest.approx(list(whole[name]), rel=1e-10)
    assert reference[0] == pytest.approx(numbers, rel=1e-11, abs=1e-12) and reference[1:] == [features, count]
