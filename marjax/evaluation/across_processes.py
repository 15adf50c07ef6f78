"""Sharing work out over the JAX processes of a run, and bringing the results of all of them together."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_AT_A_TIME = 2**23  # values that `sum` holds of all hosts together: 64 MiB


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is; alone by default. `all_processes` makes the real one.

    Whatever gathers is called by all of them, in the same order and with the same shapes.
    """

    index: int = 0
    count: int = 1

    def share(self, number: int) -> range:
        """Which of `number` pieces of work are this host's: each is one host's, and all have as many but for one."""
        return range(self.index, number, self.count)

    def allgather(self, values: np.ndarray) -> np.ndarray:
        """(count, ...) of each host's values (...), float64 or int64, to the bit. Raises ValueError for other types."""
        values = np.asarray(values)
        if values.dtype not in (np.float64, np.int64):
            raise ValueError(f"values are {values.dtype}: expected float64 or int64")
        if self.count == 1:
            return values[None]
        # JAX would round 64 bits to 32, so they travel as pairs of words.
        words: Any = multihost_utils.process_allgather(values.ravel().view(np.uint32))
        return np.ascontiguousarray(words).view(values.dtype).reshape(self.count, *values.shape)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over processes, in their order and so the same on each: shape and type as `allgather` takes them.

        Memory for one more such array and 64 MiB, however many hosts there are.
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


def all_processes() -> Processes:
    """The JAX processes of this run."""
    return Processes(jax.process_index(), jax.process_count())
