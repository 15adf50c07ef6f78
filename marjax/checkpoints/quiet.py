"""Keeps Orbax from printing the failures that it raises too: hundreds of lines for one full disk.

Orbax logs a traceback in each of its threads. It also closes its event loops at the first error; every read or write
still pending on one then prints a traceback of its own.
"""

import asyncio
import contextlib
import logging
import threading
import types
from typing import Any

from marjax.closeable import Closeable


class _DrainingLoop(asyncio.SelectorEventLoop):
    """An event loop that completes its tasks before it closes, and reports no exception that nobody awaits."""

    def __init__(self) -> None:
        super().__init__()
        self.set_exception_handler(lambda loop, context: None)

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return None if self.is_closed() else super().call_soon_threadsafe(*args, **kwargs)

    def close(self) -> None:
        pending = set() if self.is_closed() else asyncio.all_tasks(self)
        if pending:
            done, _ = self.run_until_complete(asyncio.wait(pending, timeout=60))
            for task in done:
                if not task.cancelled():
                    task.exception()  # once retrieved, asyncio does not report it
        super().close()


_ASYNCIO = types.SimpleNamespace(**vars(asyncio) | {"new_event_loop": _DrainingLoop})


class QuietOrbax(Closeable):
    """Until it is closed, Orbax does not print exceptions that it raises; it logs warnings and other errors as before.

    Orbax makes its event loops itself, in background threads: as long as one of these is open, they drain.
    """

    _lock, _num_open = threading.Lock(), 0

    def __init__(self) -> None:
        logging.getLogger("absl").addFilter(_is_no_failure_of_orbax)  # which is added once
        self._count(1)

    def close(self) -> None:
        self._count(-1)

    @classmethod
    def _count(cls, change: int) -> None:
        with cls._lock, contextlib.suppress(ImportError):  # private to Orbax: without it, more is printed
            from orbax.checkpoint._src import asyncio_utils

            cls._num_open += change
            asyncio_utils.asyncio = _ASYNCIO if cls._num_open else asyncio


def _is_no_failure_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or not record.exc_info or "orbax" not in record.pathname
