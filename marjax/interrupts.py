"""Ctrl-C is never lost, and in training a notice to save and stop at a step, as SIGTERM is.

Python prints and drops a KeyboardInterrupt raised in `__del__` or in callbacks of weak references and of the garbage
collector; JAX has such callbacks.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from marjax.errors import INTERRUPTED

_AGAIN_AFTER = 0.02  # seconds; by then the callback has returned


@contextlib.contextmanager
def never_lost() -> Iterator[None]:
    """Raises KeyboardInterrupts again that Python would drop."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt) or unraisable.exc_type is KeyboardInterrupt:
            again = threading.Timer(_AGAIN_AFTER, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


class Listener:
    """Turns Ctrl-C into a call instead of an exception; a second one ends the process with exit code INTERRUPTED.

    A thread makes the call: Python handles no signals while the main thread waits for devices.
    """

    def __init__(self, notice: Callable[[], None]) -> None:
        """Call it in the main thread; does nothing if SIGINT is ignored, as in background jobs of a shell.

        Args:
          notice: called once, in a thread.
        """
        self.given = False
        self._notice = notice
        self._before: Any = signal.getsignal(signal.SIGINT)
        self._fd = -1
        if self._before is signal.SIG_IGN:
            return
        reads, self._fd = os.pipe()
        os.set_blocking(self._fd, False)
        self._wakeup = signal.set_wakeup_fd(self._fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(reads,), name="marjax-interrupts", daemon=True).start()

    def close(self) -> None:
        """Restores the previous handling of Ctrl-C."""
        if self._fd >= 0:
            signal.signal(signal.SIGINT, self._before)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._fd)
            self._fd = -1

    def _listen(self, reads: int) -> None:
        with open(reads, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] != signal.SIGINT:
                    continue
                if self.given:
                    os._exit(INTERRUPTED)
                self.given = True
                os.write(
                    2,
                    b"marjax: interrupted: saving after this step, then stopping; press Ctrl-C again to stop at once\n",
                )
                self._notice()
