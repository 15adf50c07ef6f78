"""Worker processes: a pool that writes shards, and what all worker processes need, Grain's included."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from marjax import progress
from marjax.data.prepare.shards import Record, Shard, read_record, write_shard
from marjax.errors import TrainingError, UserError, shortened

SHARED_MEMORY = "/dev/shm"
_BATCHES_PER_WORKER = 5  # measured maximum: in Grain's queue, waiting for it, being copied, and not yet freed
_LESS_SHARED_MEMORY = "read with fewer workers, or in this process (--config.data.workers=0)"

# In a worker process: the number of pictures that all workers have finished, and whether to stop.
_shared: tuple[Any, Any] | None = None


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_shards(shards: Sequence[Shard], max_bad: int, workers: int, show: bool) -> dict[str, Record]:
    """Writes the unfinished shards, and reports unreadable pictures on stderr.

    Args:
      shards: all shards of the data set.
      max_bad: maximum number of unreadable pictures in all of them.
      workers: processes; with 1, this one.
      show: show a progress bar.

    Returns:
      The record of each shard, by its path; some are unfinished or missing if more than `max_bad` pictures are
      unreadable.

    Raises:
      TrainingError: a file cannot be written, or a worker died.
    """
    records = {shard.path: record for shard in shards if (record := read_record(shard))}
    waiting = [shard for shard in shards if shard.path not in records]
    unreadable = sum(len(record.unreadable) for record in records.values())
    done = sum(len(shard.items) for shard in shards if shard.path in records)
    with progress.bar("preparing", sum(len(shard.items) for shard in shards), "pictures", start=done, show=show) as bar:
        runs = _in_this_process if min(workers, len(waiting)) <= 1 else _in_processes
        # Closing it stops the workers.
        written = runs(waiting, min(workers, len(waiting)), bar)
        try:
            while unreadable <= max_bad and (pair := next(written, None)):
                shard, record = pair
                records[shard.path] = record
                unreadable += len(record.unreadable)
                for name, why in record.unreadable:
                    progress.note(f"unreadable: {shortened(name, 200)}: {why}")
        finally:
            written.close()
    return records


def _in_this_process(shards: Sequence[Shard], workers: int, bar: Any) -> Generator[tuple[Shard, Record], None, None]:
    del workers
    for shard in shards:
        yield shard, write_shard(shard, bar.update, lambda: False)


def _in_processes(shards: Sequence[Shard], workers: int, bar: Any) -> Generator[tuple[Shard, Record], None, None]:
    # Spawned: a fork of a process with JAX's threads may hang.
    context = multiprocessing.get_context("spawn")
    with safe_path():
        count, stop, before = context.Value("q", 0), context.Event(), bar.n
    with ProcessPoolExecutor(workers, context, _start_worker, (count, stop)) as pool:
        with safe_path(), blocked_signals():
            running = {pool.submit(_write_in_worker, shard): shard for shard in shards}
        try:
            while running:
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(before + count.value - bar.n)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise TrainingError(
                f"one of {workers} worker processes died, perhaps for lack of memory: start the same "
                f"command again with fewer workers"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Raises UserError: the batches of Grain's worker processes may not fit in shared memory, a bus error otherwise.

    Args:
      batch_bytes: size of this host's part of a batch.
      workers: number of processes.
    """
    free, needed = shared_memory_free(), batch_bytes * (_BATCHES_PER_WORKER * workers + 1)
    if free is not None and needed > free:
        raise UserError(
            f"{SHARED_MEMORY} has {_mib(free)} MiB free, but {workers} worker processes pass batches of "
            f"{_mib(batch_bytes)} MiB through it and need up to {_mib(needed)} MiB: give the container "
            f"more (docker run --shm-size={-(-needed // 2**30)}g), or {_LESS_SHARED_MEMORY}"
        )


def shared_memory_free() -> int | None:
    """Free bytes of shared memory; None if there is no such limit, as on macOS."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def explain_death(error: BaseException) -> TrainingError | None:
    """The error to report if a worker process of Grain was killed; None for any other error."""
    found = re.search(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error))
    if found is None:
        return None
    if int(found[1]) == -signal.SIGBUS:
        return TrainingError(
            f"a worker process ran out of {SHARED_MEMORY}: give the container more (docker run "
            f"--shm-size), or {_LESS_SHARED_MEMORY}"
        )
    return TrainingError(
        f"a worker process ended with exit code {found[1]}, perhaps for lack of memory: start again with fewer "
        f"--config.data.workers"
    )


def _mib(size: int) -> int:
    return -(-size // 2**20)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Worker processes started in this block do not import from the current folder.

    Python puts it first on the path of a spawned process, until the process receives its parent's path.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = before or "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Processes and threads started in this block ignore Ctrl-C and SIGTERM until `serve_parent` takes over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(count: Any, stop: Any) -> None:
    global _shared
    _shared = count, stop
    serve_parent()


def serve_parent() -> None:
    """In a worker process: ends it with its parent, and ignores signals to the process group.

    Ctrl-C and a scheduler's SIGTERM reach the whole group; the parent handles them.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent has been killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _write_in_worker(shard: Shard) -> Record:
    assert _shared is not None
    count, stop = _shared
    return write_shard(shard, _ticker(count), stop.is_set)


def _ticker(count: Any) -> Callable[[], None]:
    def tick() -> None:
        with count.get_lock():
            count.value += 1

    return tick
