"""Checks the files of a checkpoint before Orbax reads them: Orbax blocks on a pipe and reads any file whole."""

import os
from collections.abc import Iterable

from etils import epath

from marjax.errors import shortened
from marjax.storage import is_remote

TIMES = "_CHECKPOINT_METADATA"
MAX_BYTES = 64 << 20  # of a file of metadata: the largest of 10^5 arrays has 40 MB
_DATA = "d"  # the folders of the arrays' bytes, which are read in parts


def check_times(directory: epath.Path) -> None:
    """Checks the files that are read of all checkpoints in a directory to list them. Raises ValueError, OSError."""
    if not is_remote(directory) and os.path.isdir(directory):
        with os.scandir(directory) as checkpoints:
            _check(os.path.join(each.path, TIMES) for each in checkpoints)


def check_part(folder: epath.Path) -> None:
    """Checks the files of one part of a checkpoint.

    Raises:
      ValueError: one is a pipe, device or link to a folder, or metadata are too long.
      OSError: the folder cannot be read.
    """
    if is_remote(folder):
        return
    waiting = [os.fspath(folder)]
    while waiting:
        inside = waiting.pop()
        with os.scandir(inside) as scanned:
            entries = list(scanned)
        waiting += [each.path for each in entries if each.is_dir(follow_symlinks=False)]
        files = [each for each in entries if not each.is_dir(follow_symlinks=False)]
        if os.path.basename(inside) == _DATA:
            files = [each for each in files if not each.is_file()]  # on most systems without asking for its size
        _check(each.path for each in files)


def _check(paths: Iterable[str]) -> None:
    for path in paths:
        if not os.path.isfile(path):
            if os.path.lexists(path):
                raise ValueError(f"{shortened(path, 200)} is not a regular file")
        elif (size := os.path.getsize(path)) > MAX_BYTES and os.path.basename(os.path.dirname(path)) != _DATA:
            raise ValueError(f"{shortened(path, 200)} has {size} bytes, expected at most {MAX_BYTES}")
