"""Event files for TensorBoard, written by tensorboardX: no TensorFlow.

Its SummaryWriter is not used. That hands events to a thread of its own, which a failed write ends without a word, and
then waits for ever for room in the queue; and on gs:// it sends the whole file at every flush.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from marjax.errors import TrainingError
from marjax.files import write_bytes
from marjax.loggers.protocol import Logger
from marjax.storage import is_remote

_UPLOAD_PAUSE = 300.0  # seconds; an object is written as a whole


class Events(Logger):
    """One event file. A file on an object store is written on this machine, and copied there now and then.

    All methods but `close` are for one thread; they raise TrainingError where the disk cannot be written, StorageError
    where the store does not answer.
    """

    def __init__(self, folder: str | os.PathLike[str], start_step: int) -> None:
        """Args:
        folder: local or gs://; made if need be.
        start_step: events of later steps in other files of the folder are not shown any more.
        """
        self._folder = epath.Path(folder)
        self._remote = is_remote(folder)
        self._local = tempfile.mkdtemp(prefix="marjax-events-") if self._remote else os.fspath(self._folder)
        self._uploaded, self._pending = time.monotonic(), False
        with self._explained():
            os.makedirs(self._local, exist_ok=True)
            self._writer = EventsWriter(os.path.join(self._local, "events"))
        self._add(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""
        for name, value in values.items():
            self._add(Event(step=step, summary=summary.scalar(name, value)))
        self._flush()

    def text(self, name: str, text: str) -> None:
        """A text in Markdown."""
        self._add(Event(summary=summary.text(name, text)))
        self._flush()

    def hparams(self, values: Mapping[str, bool | int | float | str]) -> None:
        """The settings of the run, for the HPARAMS tab, which compares runs by their loss."""
        for part in summary.hparams(dict(values), {"train/loss": None}):
            self._add(Event(summary=part))
        self._flush()

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3)."""
        self._add(Event(step=step, summary=summary.image(name, picture, dataformats="HWC")))
        self._flush()

    def close(self) -> None:
        """Ends the file, and copies it where it belongs."""
        try:
            with self._explained():
                self._writer.close()
            self._upload()
        finally:
            if self._remote:
                shutil.rmtree(self._local, ignore_errors=True)

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        with self._explained():
            self._writer.write_event(event)
        self._pending = True

    def _flush(self) -> None:
        with self._explained():
            self._writer.flush()
        if time.monotonic() - self._uploaded >= _UPLOAD_PAUSE:
            self._upload()

    def _upload(self) -> None:
        if not (self._remote and self._pending):
            return
        self._uploaded = time.monotonic()
        for name in os.listdir(self._local):
            with open(os.path.join(self._local, name), "rb") as file:
                write_bytes(self._folder / name, file.read())
        self._pending = False

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self._local} cannot be written ({error.strerror or error}): make room, then start the same again"
            ) from None
