"""Runs a logger in its own thread, so that its failures do not reach the run."""

import queue
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from marjax import progress
from marjax.errors import first_line, shortened
from marjax.loggers.protocol import Logger

_PATIENCE = 60.0  # seconds that a run waits for a logger at its end


def reason(error: Exception) -> str:
    """The type and the first line of an exception."""
    return f"{type(error).__name__}: {shortened(first_line(error, ''), 200)}"


class Guarded(Logger):
    """Forwards calls to a logger in its thread; reports its first exception and then ends it."""

    def __init__(self, logger: Logger, name: str | None = None) -> None:
        self._logger, self._name = logger, name or type(logger).__name__
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._failed = False
        # A daemon thread, so that the interpreter can exit while a service hangs.
        self._thread = threading.Thread(target=self._work, name=f"marjax-{self._name}", daemon=True)
        self._thread.start()

    def hparams(self, values: Mapping[str, bool | int | float | str]) -> None:
        self._calls.put(("hparams", (values,)))

    def text(self, name: str, text: str) -> None:
        self._calls.put(("text", (name, text)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._calls.put(("scalars", (step, values)))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._calls.put(("image", (step, name, picture)))

    def close(self) -> None:
        """Ends the logger after all its calls; waits a minute at most."""
        self._calls.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            progress.note(f"logger {self._name} does not answer; its pending calls are lost")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if not self._failed:
                self._try(*call)
        self._try("close", ())

    def _try(self, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            getattr(self._logger, method)(*arguments)
        except Exception as error:
            if not self._failed:
                progress.note(f"logger {self._name} failed in {method} ({reason(error)}); the run continues without it")
            self._failed = True
