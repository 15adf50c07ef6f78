"""Writes metrics: JSON lines and TensorBoard events in the work directory, a bar or lines on standard error.

Metric names are paths (`train/loss`, `perf/mfu`). Only process 0 writes, in its own thread, so that slow storage does
not delay steps.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from etils import epath

from marjax import progress as progress_lib
from marjax.closeable import Closeable
from marjax.errors import StorageError, UserError
from marjax.events import Events
from marjax.files import write_bytes
from marjax.images import write_png
from marjax.loggers import Guarded
from marjax.metrics_file import METRICS, read_metrics
from marjax.storage import explain, is_remote

FOREIGN = "metrics-foreign.txt"
_REMOTE_PAUSE = 30.0  # seconds between writes of metrics.jsonl to an object store


class MetricWriter(Closeable):
    """Writes `metrics.jsonl`, `samples/*.png` and TensorBoard events of one run; a context manager.

    Args:
      workdir: the work directory, which exists.
      start_step: lines of later steps are dropped, because a resumed run writes them again.
      total_steps: the length of the progress bar.
      tensorboard: whether to write events.
      progress: whether to show a bar.
      active: whether to write anything; false on all processes but the first.
      loggers: more loggers; closed with the writer.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        start_step: int,
        total_steps: int,
        tensorboard: bool = True,
        progress: bool = True,
        active: bool = True,
        loggers: Sequence[Guarded] = (),
    ) -> None:
        self.active = active
        self._root = epath.Path(workdir)
        self._events: Events | None = None
        self._path = self._root / METRICS
        self._pool = ThreadPoolExecutor(1, "marjax-metrics")
        self._writes: list[Future[None]] = []
        self._unwritten = self._lines_wait = False
        # Object stores cannot append: rewriting the file at every line would send gigabytes over a long run.
        self._pause = _REMOTE_PAUSE if is_remote(workdir) else 0.0
        self._last_write = -math.inf
        self._outage: StorageError | None = None
        self._lines: list[dict[str, Any]] = []
        self._total, self._progress = total_steps, progress
        self._bar: progress_lib.Bar | None = None  # created by the first call of `progress`
        self._loggers = loggers
        self._sent: set[tuple[int, str]] = set()  # by an earlier start, whose steps are repeated
        if not active:
            return
        # Kept in memory to be rewritten: a run of 250,000 steps logs about 2,500 lines.
        self._lines = self._resume_lines(start_step)
        self._write_lines()
        if tensorboard:
            self._events = Events(self._root / "tensorboard", start_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Writes one line of metrics; returns the finite values. Others (means over no token) are left out."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if not self.active:
            return finite
        self._lines.append({"step": step, **finite})
        self._unwritten = True
        if time.monotonic() - self._last_write >= self._pause:
            self._queue_lines()
        if (events := self._events) is not None:
            self._queue(lambda: events.scalars(step, finite))
        new = {name: value for name, value in finite.items() if (step, name) not in self._sent}
        for logger in self._loggers if new else ():
            logger.scalars(step, new)
        shown = {
            "loss": finite.get("train/loss"),
            "img/s/chip": finite.get("perf/images_per_sec_per_chip"),
            **{name.removeprefix("eval/"): value for name, value in finite.items() if name.startswith("eval/")},
        }
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        if self._bar is not None:
            self._bar.detail = text
        if self._bar is None or not (self._bar.show and progress_lib.is_live()):
            eta = "" if self._bar is None else self._bar.eta()
            progress_lib.note(f"step {step}: {text}{eta and f', ETA {eta}'}")
        return dict(finite)  # a callback may change it

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes a picture, uint8 (H, W, 3), as `samples/<name>_<step>.png` and to TensorBoard."""
        if not self.active:
            return
        self._queue(lambda: self._write_picture(step, name, picture))
        for logger in self._loggers:
            logger.image(step, name, picture)

    def describe(self, config: Mapping[str, Any]) -> None:
        """Writes the config by dotted names to TensorBoard and loggers; omits None, converts lists to text."""
        if not self.active:
            return
        values = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in config.items()
            if value is not None
        }
        text = f"```json\n{json.dumps(values, indent=2)}\n```"
        if (events := self._events) is not None:
            self._queue(lambda: events.text("config", text))
            self._queue(lambda: events.hparams(values))
        for logger in self._loggers:
            logger.hparams(values)
            logger.text("config", text)

    def has(self, step: int, prefix: str) -> bool:
        """Whether this step has a metric with this prefix. Only an active writer knows."""
        return any(line["step"] == step and any(name.startswith(prefix) for name in line) for line in self._lines)

    def progress(self, step: int) -> None:
        """Shows the number of finished steps; the first call gives those of earlier starts."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        elif self.active:
            self._bar = progress_lib.bar("train", self._total, "steps", start=step, show=self._progress)

    def pause(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Shows other work than steps, such as "drawing pictures", and excludes its time from the ETA."""
        return contextlib.nullcontext() if self._bar is None else self._bar.pause(what)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.active:
            progress_lib.note(text)

    def flush(self, seconds: float | None = None) -> bool:
        """Waits, at most for `seconds`, and returns whether all is written. Raises UserError: a failed write."""
        if self._unwritten:
            self._queue_lines()
        wait(self._writes, seconds)
        self._raise_failures()
        return not self._writes and self._outage is None

    def close(self) -> None:
        """Writes what is pending. Raises UserError: a failed write; StorageError: the store does not answer."""
        if self._bar is not None:
            self._bar.close()
        if self._unwritten:
            self._queue_lines()
        for logger in self._loggers:
            logger.close()
        self._pool.shutdown()
        if self._events is not None:
            self._events.close()
        self._raise_failures()
        if self._outage is not None:
            raise self._outage

    def _queue_lines(self) -> None:
        self._unwritten, self._last_write = False, time.monotonic()
        if not self._lines_wait:  # else the queued write includes these lines
            self._lines_wait = True
            self._queue(self._write_lines)

    def _queue(self, write: Callable[[], None]) -> None:
        self._raise_failures()
        self._writes.append(self._pool.submit(self._try, write))

    def _try(self, write: Callable[[], None]) -> None:
        """If the object store fails, pictures and events are lost, and the lines are retried later."""
        try:
            write()
        except Exception as error:
            outage = explain(error)
            if not isinstance(outage, StorageError):
                raise
            if self._outage is None:
                self.note(f"metrics are not being written: {outage}")
            self._outage, self._unwritten = outage, True

    def _raise_failures(self) -> None:
        done = [write for write in self._writes if write.done()]
        self._writes = [write for write in self._writes if not write.done()]
        for write in done:
            write.result()

    def _write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        folder = self._root / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"{name}_{step:08d}.png", picture)
        if self._events is not None:
            self._events.image(step, name, picture)

    def _resume_lines(self, start_step: int) -> list[dict[str, Any]]:
        """Reads the lines up to a step, and moves foreign lines to a file beside this one."""
        found = read_metrics(self._path)
        if found.foreign:
            kept = self._path.with_name(FOREIGN)
            before = kept.read_bytes() if kept.exists() else b""
            write_bytes(kept, before + b"".join(line + b"\n" for line in found.foreign))
            progress_lib.note(f"moved the ignored lines of {self._path} to {kept}")
        self._sent = {(line["step"], name) for line in found.lines if line["step"] > start_step for name in line}
        return [line for line in found.lines if line["step"] <= start_step]

    def _write_lines(self) -> None:
        self._lines_wait = False
        text = "".join(json.dumps(line) + "\n" for line in list(self._lines))
        try:
            write_bytes(self._path, text.encode())
        except UserError as error:
            raise UserError(f"{error}, to resume") from None
        self._outage = None
