"""Checks the files of a checkpoint before Orbax reads them: it blocks on pipes and reads files of any size."""

import os
from collections.abc import Iterable

from etils import epath

from marjax.errors import shortened
from marjax.storage import is_remote

TIMES = "_CHECKPOINT_METADATA"
MAX_BYTES = 64 << 20  # of a metadata file; that of 10^5 arrays has at most 40 MB
_DATA = "d"  # name of folders of array data, which is read in parts


def check_times(directory: epath.Path) -> None:
    """Checks the files that Orbax reads to list the checkpoints in a directory. Raises ValueError, OSError."""
    if not is_remote(directory) and os.path.isdir(directory):
        with os.scandir(directory) as checkpoints:
            _check(os.path.join(each.path, TIMES) for each in checkpoints)


def check_part(folder: epath.Path) -> None:
    """Checks the files of one part of a checkpoint.

    Raises:
      ValueError: a file is a pipe, device or link to a folder, or a metadata file is too long.
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
            files = [each for each in files if not each.is_file()]  # on most systems without a stat call
        _check(each.path for each in files)


def _check(paths: Iterable[str]) -> None:
    for path in paths:
        if not os.path.isfile(path):
            if os.path.lexists(path):
                raise ValueError(f"{shortened(path, 200)} is not a regular file")
        elif (size := os.path.getsize(path)) > MAX_BYTES and os.path.basename(os.path.dirname(path)) != _DATA:
            raise ValueError(f"{shortened(path, 200)} has {size} bytes, expected at most {MAX_BYTES}")
