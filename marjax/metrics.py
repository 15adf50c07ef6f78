"""Where metrics go: JSON lines and TensorBoard in the work directory, a bar or lines on standard error.

Metric names are paths (`train/loss`, `perf/mfu`). Only process 0 writes, in a thread of its own, so that slow storage
does not hold up the steps.
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
from marjax.closing import Closing
from marjax.errors import StorageError, UserError
from marjax.events import Events
from marjax.files import write_bytes
from marjax.images import write_png
from marjax.loggers import Guarded
from marjax.metrics_file import METRICS, read_metrics
from marjax.storage import explain, is_remote

FOREIGN = "metrics-foreign.txt"
_REMOTE_PAUSE = 30.0  # seconds between writes of metrics.jsonl to an object store


class MetricWriter(Closing):
    """Writes `metrics.jsonl`, `samples/*.png` and TensorBoard events of one run; a context manager, to be closed.

    Args:
      workdir: the work directory, which exists.
      start_step: lines of later steps are dropped, since a resumed run writes them again.
      total_steps: the length of the progress bar.
      tensorboard: whether to write events.
      progress: whether to show a bar.
      active: false on every process but the first; then nothing is written.
      loggers: further ones to report to, which are closed with the writer.
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
        # An object is written anew as a whole: at every line, that would be gigabytes over a long run.
        self._pause = _REMOTE_PAUSE if is_remote(workdir) else 0.0
        self._last_write = -math.inf
        self._outage: StorageError | None = None
        self._lines: list[dict[str, Any]] = []
        self._total, self._progress = total_steps, progress
        self._bar: progress_lib.Bar | None = None  # from the first call of `progress` on
        self._loggers = loggers
        self._sent: set[tuple[int, str]] = set()  # what an earlier start has sent to loggers, and this does again
        if not active:
            return
        # Kept in memory, because object stores cannot append: a run of 250,000 steps logs some 2,500 lines.
        self._lines = self._resume_lines(start_step)
        self._write_lines()
        if tensorboard:
            self._events = Events(self._root / "tensorboard", start_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics; values that are not finite (a term without any token) are left out."""
        if not self.active:
            return
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
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

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3), as `samples/<name>_<step>.png` and in TensorBoard."""
        if not self.active:
            return
        self._queue(lambda: self._write_picture(step, name, picture))
        for logger in self._loggers:
            logger.image(step, name, picture)

    def describe(self, config: Mapping[str, Any]) -> None:
        """The run's config by dotted names, for TensorBoard and loggers; None is left out, lists become text."""
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
        """Whether a metric with a name that begins so was written at that step. Only an active writer knows."""
        return any(line["step"] == step and any(name.startswith(prefix) for name in line) for line in self._lines)

    def progress(self, step: int) -> None:
        """Shows how many steps are done: first those of earlier starts, then at every step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        elif self.active:
            self._bar = progress_lib.bar("train", self._total, "steps", start=step, show=self._progress)

    def pause(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Shows other work than steps, such as "drawing pictures", whose time does not count for the bar's ETA."""
        return contextlib.nullcontext() if self._bar is None else self._bar.pause(what)

    def note(self, text: str) -> None:
        """A line for the person who watches; does not break the bar."""
        if self.active:
            progress_lib.note(text)

    def flush(self, seconds: float | None = None) -> bool:
        """Waits until all is written, or for so long; whether it is. Raises UserError: something cannot be."""
        if self._unwritten:
            self._queue_lines()
        wait(self._writes, seconds)
        self._raise_failures()
        return not self._writes and self._outage is None

    def close(self) -> None:
        """Writes what is left. Raises UserError: something could not be written; StorageError: no answer."""
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
        if not self._lines_wait:  # else the write that waits takes the lines along
            self._lines_wait = True
            self._queue(self._write_lines)

    def _queue(self, write: Callable[[], None]) -> None:
        self._raise_failures()
        self._writes.append(self._pool.submit(self._try, write))

    def _try(self, write: Callable[[], None]) -> None:
        """Of what an object store does not take, pictures and events are lost; the lines are tried again later."""
        try:
            write()
        except Exception as error:
            told = explain(error)
            if not isinstance(told, StorageError):
                raise
            if self._outage is None:
                self.note(f"metrics are not being written: {told}")
            self._outage, self._unwritten = told, True

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
        """The lines up to a step; foreign ones, which do not stay in the file, go into a file beside it."""
        found = read_metrics(self._path)
        if found.foreign:
            kept = self._path.with_name(FOREIGN)
            before = kept.read_bytes() if kept.exists() else b""
            write_bytes(kept, before + b"".join(line + b"\n" for line in found.foreign))
            progress_lib.note(f"{kept} has the ignored lines of {self._path}")
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
