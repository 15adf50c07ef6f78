"""Progress on standard error: bars for counted work, elapsed time for other work, and notes between them.

On a terminal or in a notebook, one line is redrawn in place. Elsewhere, such as in the log of a job, lines are printed:
one when a bar starts (a few seconds later for other work, and for a bar inside other work), then one after every ten
seconds of silence, or 1% of the elapsed time if that is longer. A daemon thread reports long tasks, such as a
compilation; nothing here waits for devices. Only process 0 prints. Results belong on standard output.

    with progress.activity("loading the checkpoint"):
        ...
    with progress.bar("sampling", total=10, unit="batches") as bar:
        for batch in batches:
            ...
            bar.update()
    progress.note("a line that does not break the bar")
"""

import contextlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from marjax.closeable import Closeable

_SILENCE, _SHARE = 9.0, 0.01  # longest silence without a terminal: seconds, and as a share of the elapsed time
_START = 3.0  # seconds from the start of a process to that of its command
_TICK = 0.5  # seconds between checks of the thread
_MOMENT = 3.0  # seconds; shorter work gets no line, unless it is an outermost bar
_REDRAW = 0.1  # minimum seconds between redraws of a live line
_MEMORY = 300.0  # seconds over which a bar's rate is averaged

_XLA_LEVEL, _XLA_DEFAULT = "TF_CPP_MIN_LOG_LEVEL", "1"  # which JAX sets
KEPT = "compiled programs are kept: the next start skips this"


class Task(Closeable):
    """Work without a count: its name and elapsed time."""

    def __init__(
        self, console: "Console", what: str, *, show: bool = True, advice: str = "", is_command: bool = False
    ) -> None:
        self.what, self.show, self.advice, self.is_command = what, show, advice, is_command
        self.printed = self.advised = False  # whether the task, and its advice, were printed
        self._console = console
        self.begun = console.now()
        console.open(self)

    def close(self) -> None:
        """Ends the task; a second call does nothing."""
        self._console.close(self)

    def seconds(self) -> float:
        """Seconds since the task began."""
        return self._console.now() - self.begun

    def line(self) -> str:
        """The task as a log line."""
        seconds = self.seconds()
        if seconds < 1:
            return self.what
        advice = f" ({self.advice})" if self.advice and not self.advised else ""
        return f"{self.what}: {tqdm.format_interval(seconds)}{advice}"

    def live(self, width: int) -> str:
        """The task as a live line of at most `width` columns."""
        return self.line()

    def last(self) -> str:
        """The line that remains when the task is closed, or ""."""
        return ""


class Bar(Task):
    """Counted work. Rate and ETA exclude pauses and the first update, which compiles."""

    def __init__(
        self, console: "Console", what: str, total: int | None, unit: str, start: int, *, show: bool = True
    ) -> None:
        self.n, self.start, self.total, self.unit = start, start, total, unit
        self.detail = ""  # after the numbers
        self._updated: float | None = None  # time of the last update, plus pauses since
        self._count = self._seconds = 0.0  # decaying sums over past updates
        super().__init__(console, what, show=show)

    def update(self, count: int = 1) -> None:
        """Counts finished units."""
        now = self._console.now()
        if self._updated is not None:
            seconds = max(now - self._updated, 0.0)
            kept = math.exp(-seconds / _MEMORY)
            self._count, self._seconds = self._count * kept + count, self._seconds * kept + seconds
        self._updated, self.n = now, self.n + count
        self._console.redraw(self)

    @contextlib.contextmanager
    def pause(self, what: str, advice: str = "") -> Iterator[None]:
        """An activity whose time does not count towards the rate."""
        begun = self._console.now()
        try:
            with Task(self._console, what, advice=advice):
                yield
        finally:
            if self._updated is not None:
                self._updated += self._console.now() - begun

    def rate(self) -> float:
        """Units per second; 0 if not yet known."""
        return self._count / self._seconds if self._seconds > 0 else 0.0

    def eta(self) -> str:
        """The remaining time, such as "02:05"; "" if it is unknown or zero."""
        if self.total is None or self.n >= self.total or not self.rate():
            return ""
        return str(tqdm.format_interval((self.total - self.n) / self.rate()))

    def line(self) -> str:
        done = f"{self.n}" if self.total is None else f"{self.n} of {self.total}"
        if self.n == self.start:
            later = f", {tqdm.format_interval(self.seconds())}" if self.seconds() >= 1 else ""
        else:
            later = f", {tqdm.format_interval(self.seconds())}"
            if self.total is not None and self.n < self.total:
                later += f", ETA {self.eta() or '?'}"
        return f"{self.what}: {done} {self.unit}{later}{self.detail and f', {self.detail}'}"

    def live(self, width: int) -> str:
        meter = tqdm.format_meter(
            self.n,
            self.total,
            self.seconds(),
            ncols=width,
            prefix=self.what,
            ascii=not _has_blocks(self._console.stream),
            unit=f" {self.unit}",
            rate=self.rate(),
            postfix=self.detail,
            initial=self.start,
        )
        return str(meter)

    def last(self) -> str:
        return self.line() if self.n > self.start else ""


class Console:
    """Prints notes and the innermost open task."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
        now: Callable[[], float] = time.monotonic,
        threads: bool = True,
    ) -> None:
        """Args:
        stream: output, by default the current `sys.stderr`.
        live: whether to redraw a line in place, by default on terminals and in notebooks.
        now: the clock, in seconds.
        threads: whether a thread calls `tick`.
        """
        self._stream, self._live, self.now, self._threads = stream, live, now, threads
        self._lock = threading.RLock()
        self._tasks: list[Task] = []
        self._line = ""  # the live line on the terminal
        self._drawn = self._printed = -math.inf
        self._stop: threading.Event | None = None
        self._first = True  # whether this is the first process of its run

    @property
    def stream(self) -> Any:
        """The output, or None if standard error is closed."""
        return sys.stderr if self._stream is None else self._stream

    @property
    def live(self) -> bool:
        """Whether a line is redrawn in place."""
        if self._live is not None:
            return self._live
        stream = self.stream
        return stream is not None and (stream.isatty() or type(stream).__module__.startswith("ipykernel."))

    def open(self, task: Task) -> None:
        """Shows a task."""
        first = _is_first()
        with self._lock:
            self._first = first
            task.show = task.show and first and all(each.show for each in self._tasks)
            inside = any(not each.is_command for each in self._tasks)
            self._tasks.append(task)
            if self.live:
                self._draw()
            elif task.show and not inside and isinstance(task, Bar):
                self._print_task(task)
            if self._stop is None and self._threads and task.show:
                self._stop = threading.Event()
                threading.Thread(
                    target=self._keep_time, args=(self._stop,), name="marjax-progress", daemon=True
                ).start()

    def close(self, task: Task) -> None:
        """Ends a task."""
        with self._lock:
            if task not in self._tasks:
                return
            self._tasks.remove(task)
            inside = any(not each.is_command for each in self._tasks)
            if task.show and self.live:
                self._erase()
                if task.last() and not inside:
                    self._write(disp_trim(task.live(self._width()), self._width()) + "\n")
                self._draw()
            elif task.printed and task.last():
                self._print(task.last())
            if not self._tasks and self._stop is not None:
                self._stop.set()
                self._stop = None

    def redraw(self, task: Task) -> None:
        """Shows a task's new state, at most every _REDRAW seconds."""
        if task.show and self.now() - self._drawn >= _REDRAW:
            with self._lock:
                if self.live and self._tasks and self._tasks[-1] is task:
                    self._draw()
        if not self._threads:
            self.tick()

    def note(self, text: str, file: TextIO | None = None) -> None:
        """Prints a line."""
        with self._lock:
            self._erase()
            if file is None:
                self._print(text)
            else:
                print(text, file=file, flush=True)
                self._printed = self.now()
            self._draw()

    def tick(self) -> None:
        """Reports the innermost task if nothing was printed for a while."""
        with self._lock:
            if not self._tasks or not (task := self._tasks[-1]).show or not self._first:
                return
            shown = max(self._printed, self._drawn)
            quiet = self.now() - max(shown, self._tasks[0].begun - (_START if task.is_command else 0.0))
            if self.live and not task.is_command:
                if self.now() - self._drawn >= _TICK:
                    self._draw()
            elif quiet >= max(_SILENCE, _SHARE * self._tasks[0].seconds()) or not (
                task.printed or task.is_command or task.seconds() < _MOMENT
            ):
                self._print_task(task)

    def _keep_time(self, stop: threading.Event) -> None:
        with contextlib.suppress(OSError, ValueError):  # standard error is gone
            while not stop.wait(_TICK):
                with self._lock:
                    if not stop.is_set():
                        self.tick()

    def _draw(self) -> None:
        if self._tasks and self._tasks[-1].show and not self._tasks[-1].is_command and self.live:
            line = disp_trim(self._tasks[-1].live(self._width()), self._width())
            self._write("\r" + line + " " * max(0, disp_len(self._line) - disp_len(line)))
            self._line, self._drawn = line, self.now()

    def _erase(self) -> None:
        if self._line:
            self._write("\r" + " " * disp_len(self._line) + "\r")
            self._line = ""

    def _print_task(self, task: Task) -> None:
        self._print(task.line())
        task.printed, task.advised = True, task.seconds() >= 1

    def _print(self, text: str) -> None:
        self._write(text + "\n")
        self._printed = self.now()

    def _write(self, text: str) -> None:
        if (stream := self.stream) is not None:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()

    @staticmethod
    def _width() -> int:
        return max(shutil.get_terminal_size().columns - 1, 20)


_console = Console()


def bar(what: str, total: int | None, unit: str, *, start: int = 0, show: bool = True) -> Bar:
    """Shows counted work until it is closed; a context manager.

    Args:
      what: name of the work, such as "sampling".
      total: number of units, or None if unknown.
      unit: name of the units, such as "batches".
      start: number of units done before.
      show: whether to show this task and those inside it.
    """
    return Bar(_console, what, total, unit, start, show=show)


def activity(what: str, *, advice: str = "", show: bool = True) -> Task:
    """Shows work without a count until it is closed; a context manager.

    Args:
      what: name of the work, such as "loading the checkpoint".
      advice: printed if it takes more than a moment.
      show: whether to show this task and those inside it.
    """
    return Task(_console, what, advice=advice, show=show)


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """The activity of compiling `what`, such as "the train step", without XLA's own alarm after two minutes."""
    with Task(_console, f"compiling {what}", advice=KEPT), _without_xla_errors():
        yield


@contextlib.contextmanager
def _without_xla_errors() -> Iterator[None]:
    """Hides what XLA logs as errors without raising; fatal errors are printed.

    XLA has no setting for its slow compilation alarm alone, and its environment variable affects the whole process. A
    level chosen by the user is kept.
    """
    utils = getattr(sys.modules.get("jax._src.lib"), "utils", None)
    set_level = getattr(utils, "absl_set_min_log_level", None)  # not public; without it, the lines are printed
    if set_level is None or os.environ.get(_XLA_LEVEL, _XLA_DEFAULT) != _XLA_DEFAULT:
        yield
        return
    set_level(3)
    try:
        yield
    finally:
        set_level(int(_XLA_DEFAULT))


def command(what: str) -> Task:
    """A command, to be closed by the caller; shown only while no task inside it is."""
    return Task(_console, what, is_command=True)


def note(text: str, file: TextIO | None = None) -> None:
    """Prints a line on standard error, or `file`, without breaking a live line; in process 0 only."""
    if _is_first():
        _console.note(text, file)


def is_live() -> bool:
    """Whether a line is redrawn in place, as on a terminal or in a notebook."""
    return _console.live


def _is_first() -> bool:
    """Whether this is process 0 of its run. Initializes no backend in a run of one process."""
    jax = sys.modules.get("jax")
    initialized = getattr(getattr(jax, "distributed", None), "is_initialized", None)
    if initialized is None or not initialized():
        return True
    with contextlib.suppress(RuntimeError):  # the devices cannot be used
        return bool(jax.process_index() == 0)  # type: ignore[union-attr]
    return True


def _has_blocks(stream: Any) -> bool:
    try:
        "█▏".encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
