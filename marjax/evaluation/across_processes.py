"""Splits work over the JAX processes of a run and combines their results."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_AT_A_TIME = 2**23  # values over all processes that `sum` gathers at a time: 64 MiB


@dataclasses.dataclass(frozen=True)
class Processes:
    """The number of processes of a run, and the index of this one.

    Every process must call `allgather`, `sum` and `barrier`, in the same order and with the same shapes.
    """

    index: int = 0
    count: int = 1

    def share(self, number: int) -> range:
        """The pieces of work, of `number`, that this process does."""
        return range(self.index, number, self.count)

    def allgather(self, values: np.ndarray) -> np.ndarray:
        """Returns every process's values (...), float64 or int64, bit-exact as (count, ...). Raises ValueError."""
        values = np.asarray(values)
        if values.dtype not in (np.float64, np.int64):
            raise ValueError(f"values are {values.dtype}: expected float64 or int64")
        if self.count == 1:
            return values[None]
        # JAX would round 64 bits to 32, so each value travels as a pair of words.
        words: Any = multihost_utils.process_allgather(values.ravel().view(np.uint32))
        return np.ascontiguousarray(words).view(values.dtype).reshape(self.count, *values.shape)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sums float64 or int64 values over the processes, in their order, so that all get the same bits.

        Needs memory for one more such array and 64 MiB, for any number of processes.
        """
        flat = np.reshape(values, -1)
        total = np.empty_like(flat)
        size = max(1, _AT_A_TIME // self.count)
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            total[part] = self.allgather(flat[part]).sum(axis=0)
        return total.reshape(np.shape(values))

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.count > 1:
            multihost_utils.sync_global_devices("marjax.evaluation")


ALONE = Processes()


def all_processes() -> Processes:
    """The JAX processes of this run."""
    return Processes(jax.process_index(), jax.process_count())
