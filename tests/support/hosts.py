"""Several processes of a run as threads of one."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from marjax.evaluation.across_processes import Processes

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Thread(Processes):
    """One of several hosts within this process."""

    meeting: Any = None
    table: Any = None

    def allgather(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values)
        assert values.dtype in (np.float64, np.int64)
        self.table[self.index] = values.copy()
        self.meeting.wait()
        gathered: np.ndarray = np.stack(self.table)  # fails where shapes differ
        self.meeting.wait()
        return gathered


def on_hosts(count: int, work: Callable[[Processes], T]) -> T:
    """The results of work(hosts), which all hosts must agree on; one of them."""
    meeting, table = threading.Barrier(count, timeout=60), [np.zeros(0)] * count
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda index: work(Thread(index, count, meeting, table)), range(count)))
    assert all(result == results[0] for result in results)
    return results[0]
