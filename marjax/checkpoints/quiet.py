"""Orbax without what it prints of failures that it raises too: hundreds of lines for one full disk.

Orbax logs the traceback of an exception in each of its threads. It also closes its event loop at the first error, and
each read or write still under way then prints a traceback of its own.
"""

import asyncio
import contextlib
import functools
import logging
from typing import Any


class _DrainingLoop(asyncio.SelectorEventLoop):
    """An event loop that lets its tasks end before it closes, and reports no exception that nobody awaits."""

    def __init__(self) -> None:
        super().__init__()
        self.set_exception_handler(lambda loop, context: None)

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As usual; on a closed loop, which nobody listens to any more, nothing."""
        return None if self.is_closed() else super().call_soon_threadsafe(*args, **kwargs)

    def close(self) -> None:
        pending = set() if self.is_closed() else asyncio.all_tasks(self)
        if pending:
            done, _ = self.run_until_complete(asyncio.wait(pending, timeout=60))
            for task in done:
                if not task.cancelled():
                    task.exception()  # once retrieved, asyncio does not report it
        super().close()


class _Asyncio:
    """The module `asyncio`, but for the event loops it makes."""

    new_event_loop = _DrainingLoop

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


@functools.cache
def quiet_orbax() -> None:
    """Stops Orbax from printing exceptions that it raises; its warnings and other errors are logged as before."""
    with contextlib.suppress(ImportError, AttributeError):  # where it lies is Orbax's own business
        from orbax.checkpoint._src import asyncio_utils

        if asyncio_utils.asyncio is asyncio:
            asyncio_utils.asyncio = _Asyncio()
    logging.getLogger("absl").addFilter(_is_no_failure_of_orbax)


def _is_no_failure_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or not record.exc_info or "orbax" not in record.pathname
