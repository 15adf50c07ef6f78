"""Batches of examples whose content depends on the seed and the step only.

Position p = step * batch_size + row counts through an endless sequence: epoch p // N, each in its own random order.
The position alone determines which example is read and how it is augmented; of each batch, a host reads the rows that
its devices hold. A global batch therefore depends neither on the hosts and their place in the mesh nor on the number of
worker processes or threads, and a run resumes by its step number.

Grain provides threads, worker processes and prefetching. The order and the random numbers are computed here, per batch:
Grain's chain of shuffle, repeat, random_map and batch has an overhead of 80 microseconds per example, which is more
than a step of a small model takes.
"""

import contextlib
import functools
import gc
import math
import os
import pickle
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
import numpy.typing as npt
from absl import flags

from marjax.class_names import Names
from marjax.closeable import Closeable
from marjax.data.config import DataConfig
from marjax.data.examples import Examples, Images
from marjax.data.preprocess import Preprocess
from marjax.data.sources import open_source
from marjax.data.worker_processes import blocked_signals, check_shared_memory, explain_death, safe_path, serve_parent
from marjax.errors import UserError, first_line

# The third word of the counter of the random bits: their purpose. The fourth is the epoch, or the position.
_ORDER, _AUGMENT = 0, 1

_ALIGNMENT = 64  # bytes


# This host's rows of a batch: `image` uint8 (local_batch, S, S, C), or `moments` (local_batch, ...) of a latent cache,
# and `label` int32 (local_batch,).
Batch = dict[str, npt.NDArray[Any]]


class Batches(Closeable, Iterator[Batch]):
    """Iterates over this host's part of the batches from `start_step` on; a context manager.

    With `train` the batches never end, each epoch of `num_examples` (not of whole batches) contains every example once,
    and images are flipped if `data.flip`. Without, there is one pass of `num_batches` in the source's order, without
    flips; the last batch is filled up from the start of the data, so that all batches have the same shape on all hosts:
    only rows of positions below `num_examples` count.

    With `data.workers` > 0, that many spawned processes read the examples, so a script must start its work below
    `if __name__ == "__main__":`.

    Attributes:
      examples: the examples.
      num_examples: the size of the data set.
      class_names: by label; () if unknown.
      num_batches: number of global batches from step 0; None if `train`.
    """

    examples: Examples
    num_examples: int
    class_names: Names
    num_batches: int | None

    def __init__(
        self,
        data: DataConfig,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rows: npt.NDArray[np.int64] | None = None,
        train: bool = True,
        examples: Examples | None = None,
        first: int = 0,
    ):
        """Opens the source; nothing is read before the first batch.

        Args:
          data: `source`, `data_dir`, `split`, `num_classes` (see `open_source`), `image_size`, `channels`, `flip`
            (see `Preprocess`) and `workers`, the number of worker processes (0: threads of this process).
          batch_size: global batch size.
          seed: of the order and of the augmentation, at least 0.
          start_step: how many batches to skip; costs nothing.
          rows: which rows of the global batch to read, ascending (see `sharding.rows_held`); all by default.
          train: see the class.
          examples: read instead of the images of `data`, such as a latent cache; only `data.workers` is used then.
          first: without `train`, the example in row 0 of step 0, below `num_examples`.

        Raises:
          UserError: an argument or config field out of range, an error of `open_source`, or too little shared memory
            for the worker processes.
        """
        workers = data.workers
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is not positive; use at least 1")
        if rows is None:
            rows = np.arange(batch_size)
        if not len(rows) or rows[0] < 0 or rows[-1] >= batch_size or (np.diff(rows) <= 0).any():
            raise UserError(f"rows={rows} of a batch of {batch_size}: expected ascending numbers below it")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed={seed} is out of range; use 0 to 2**63 - 1")
        if start_step < 0:
            raise UserError(f"start_step={start_step} is negative; use the number of batches to skip")
        if workers < 0:
            raise UserError(f"data.workers={workers} is negative; use 0 (threads only) or a number of processes")
        if examples is None:
            preprocess = Preprocess(data.image_size, data.channels, data.flip and train)
            examples = Images(open_source(data), preprocess)
        self.examples, self.num_examples, self.class_names = examples, len(examples), examples.class_names
        if first and (train or not 0 <= first < self.num_examples):
            raise UserError(f"first={first} is out of range; use 0 to {self.num_examples - 1}, or 0 in training")
        self.num_batches = None if train else -(-(self.num_examples - first) // batch_size)
        self._iterator: grain.DatasetIterator | None = None
        self._workers = workers
        steps = _Steps(examples, batch_size, seed, rows, train, first)
        self._starts = contextlib.ExitStack()  # open until `close`: Grain may start its workers at any time
        self._first: contextlib.AbstractContextManager[None] | None = None  # of the first batch
        if workers:
            check_shared_memory(len(rows) * math.prod(examples.shape) * np.dtype(examples.dtype).itemsize, workers)
            self._starts.enter_context(safe_path())
            weakref.finalize(self, self._starts.close)  # if nobody calls `close`, or the code below fails
            self._first = blocked_signals()
        self._iterator = iter(_with_prefetch(steps, start_step, workers))

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          UserError: an unusable example; names it.
          TrainingError: a worker process was killed.
          RuntimeError: these batches are closed.
        """
        if self._iterator is None:
            raise RuntimeError("these batches are closed: open new ones, with start_step to continue")
        try:
            with self._first or contextlib.nullcontext():
                self._first = None
                return next(self._iterator)
        except StopIteration:
            raise
        except BaseException as error:
            # Grain would silently skip the batch that failed.
            self.close()
            if (
                self._workers
                and isinstance(error, TypeError | AttributeError | pickle.PickleError)
                and any("pickle" in text for text in (str(error), *getattr(error, "__notes__", ())))
            ):
                raise UserError(
                    f"data.workers={self._workers}, but the data cannot be sent to worker processes "
                    f"({first_line(error)}): set data.workers=0, or make the data picklable"
                ) from error
            if (explained := explain_death(error)) is not None:
                raise explained from error
            raise

    def close(self) -> None:
        """Ends threads and worker processes. May be called more than once."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            try:
                iterator.close()
            finally:
                self._starts.close()
            del iterator
            if self._workers:  # Grain's last batches lie in shared memory and in reference cycles
                gc.collect()


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Like np.empty, but aligned so that XLA's CPU devices can use the memory without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


class _Steps:
    """Random access to this host's batches by step number, for Grain."""

    def __init__(
        self, examples: Examples, batch_size: int, seed: int, rows: npt.NDArray[np.int64], train: bool, first: int
    ):
        self.examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._rows = rows
        self._train = train
        self._first = first

    def __len__(self) -> int:
        return sys.maxsize if self._train else -(-(len(self.examples) - self._first) // self._batch_size)

    def __getitem__(self, step: int, /) -> Batch:
        positions = self._first + step * self._batch_size + self._rows
        rows = aligned_empty((len(positions), *self.examples.shape), self.examples.dtype)
        labels = np.empty(len(positions), np.int32)
        rng, state = _generator(self._seed)
        indices = self._indices_at(positions).tolist()
        for row, (position, index) in enumerate(zip(positions.tolist(), indices, strict=True)):
            # Moving a generator to a position takes a quarter of the time of creating one.
            state["state"]["counter"][:] = (0, 0, _AUGMENT, position)
            rng.bit_generator.state = state
            rows[row], labels[row] = self.examples.read(index, rng)
        return {self.examples.kind: rows, "label": labels}

    def _indices_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        epochs, indices = np.divmod(positions, len(self.examples))
        if self._train:
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                rows = epochs == epoch
                indices[rows] = _order(len(self.examples), self._seed, epoch)[indices[rows]]
        return indices


def _generator(seed: int) -> tuple[np.random.Generator, dict[str, Any]]:
    """A generator keyed by `seed`, and its state with an empty buffer, so that a new counter takes effect at once."""
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64))
    return np.random.Generator(bits), dict(bits.state)


@functools.lru_cache(maxsize=4)
def _order(num_examples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The permutation of one epoch, from raw bits, which NumPy promises never to change, unlike `permutation`."""
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array([0, 0, _ORDER, epoch], np.uint64))
    return np.argsort(bits.random_raw(num_examples), kind="stable")


def _with_prefetch(steps: _Steps, start_step: int, workers: int) -> grain.IterDataset:
    dataset = grain.MapDataset.source(steps)[start_step:]
    # A thread makes one batch at a time, and a place in the buffer holds one. Decoding benefits from more threads; for
    # data in memory, one suffices to stay ahead of the accelerator.
    if steps.examples.in_memory:
        threads = 1
    elif workers:
        threads = 2
    else:
        threads = min(8, os.cpu_count() or 1)
    ahead = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if not workers:
        return ahead
    if not flags.FLAGS.is_parsed():
        # Grain's workers inherit its flags, which only absl.app parses (not notebooks and tests).
        flags.FLAGS.mark_as_parsed()
    shared = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_start_worker)
    # A thread copies batches out of the workers' shared memory: what is left there at exit causes warnings.
    return grain.experimental.ThreadPrefetchIterDataset(shared.map(_copied), prefetch_buffer_size=1)


def _start_worker(index: int, count: int) -> None:
    serve_parent()


def _copied(batch: Batch) -> Batch:
    copies = {key: aligned_empty(rows.shape, rows.dtype) for key, rows in batch.items()}
    for key, rows in batch.items():
        copies[key][...] = rows
    return copies
