"""TensorBoard event files, written with tensorboardX, without TensorFlow.

SummaryWriter is not used: its thread ends silently after a failed write, and the run then waits forever for its queue;
and on gs:// it sends the whole file at every flush.
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

_UPLOAD_PAUSE = 300.0  # seconds between uploads, which send the whole file


class Events(Logger):
    """One event file; for object stores it is written locally and uploaded from time to time.

    Call all methods but `close` from one thread. Raises TrainingError if the disk cannot be written, StorageError if
    the store does not answer.
    """

    def __init__(self, folder: str | os.PathLike[str], start_step: int) -> None:
        """Args:
        folder: local or gs://; created if missing.
        start_step: TensorBoard hides events of later steps in older files of the folder.
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
        """The settings of the run, for the HPARAMS tab."""
        for part in summary.hparams(dict(values), {"train/loss": None}):
            self._add(Event(summary=part))
        self._flush()

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3)."""
        self._add(Event(step=step, summary=summary.image(name, picture, dataformats="HWC")))
        self._flush()

    def close(self) -> None:
        """Closes the file and uploads it."""
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
                f"{self._local} cannot be written ({error.strerror or error}); free space and start again"
            ) from None
