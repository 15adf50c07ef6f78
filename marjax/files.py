"""Files that are written completely or not at all, and foreign files that are read safely."""

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from typing import BinaryIO, cast

from etils import epath

from marjax import failures
from marjax.errors import TrainingError, UserError
from marjax.storage import explain, is_remote


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], *, shared: bool = False, fsync: bool = False) -> Iterator[epath.Path]:
    """Yields a name beside `path` for a file or folder, which is renamed to `path` on success and removed on failure.

    Errors of the block and of renaming are raised unchanged.

    Args:
      path: local path or gs:// address.
      shared: put the process id into the name, since other processes may be writing the same file.
      fsync: flush the file to disk before it is renamed.
    """
    target = epath.Path(path)
    partial = target.parent / f"{target.name}.partial{os.getpid() if shared else ''}"
    if not is_remote(path):
        _remove(partial)  # left by a killed process, or a link that somebody else put there
    try:
        yield partial
        if fsync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        partial.replace(target) if is_remote(path) else os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        raise


def _remove(path: epath.Path) -> None:
    if not is_remote(path) and os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file, local or gs://, completely or not at all.

    Raises:
      UserError: it cannot be written.
      TrainingError: the object store fails, a StorageError if it does not answer.
    """
    try:
        if is_remote(path):  # an object is written atomically, and renaming it would cost ten requests
            epath.Path(path).write_bytes(data)
            return
        with atomic(path) as partial, open(partial, "xb") as file:
            file.write(data)
    except OSError as error:
        if is_remote(path) and (explained := explain(error)) is not None:
            raise explained from None
        raise UserError(f"{path} cannot be written ({error.strerror or error}); {failures.advice(error)}") from None


def write_text(path: str, text: str) -> None:
    """Writes a local file completely or not at all, and flushes it to disk. Raises TrainingError."""
    try:
        with (
            atomic(path, shared=True, fsync=True) as partial,
            open(partial, "x", encoding="utf-8", errors="surrogateescape") as file,
        ):
            file.write(text)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written ({error.strerror or error}); {failures.advice(error)}, then run it again"
        ) from None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file, local or gs://, for reading, without blocking on a named pipe.

    Raises:
      OSError: it cannot be opened, or is a folder, pipe or device.
    """
    if is_remote(path):
        return cast(BinaryIO, epath.Path(path).open("rb"))
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a null character, or one that cannot be encoded
        raise OSError(errno.EINVAL, "invalid characters in its name") from None
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "a folder" if stat.S_ISDIR(mode) else "not a regular file")
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_whole(path: str | os.PathLike[str], max_bytes: int, *, advice: str) -> bytes:
    """Reads an untrusted file, local or gs://, after checking its size.

    Args:
      path: path of the file.
      max_bytes: upper bound of its size.
      advice: how to fix it; the end of every error.

    Raises:
      FileNotFoundError, NotADirectoryError: the file does not exist.
      UserError: it cannot be read, or is too long.
      StorageError: gs:// does not answer.
    """
    try:
        with open_regular(path) as file:
            if file.seek(0, os.SEEK_END) > max_bytes:
                raise UserError(f"{path} has more than {max_bytes} bytes, expected at most that; {advice}")
            file.seek(0)
            return file.read(max_bytes)
    except (UserError, FileNotFoundError, NotADirectoryError):
        raise
    except MemoryError:
        raise UserError(f"{path} needs more memory than is available; {advice}") from None
    except Exception as error:
        if (explained := explain(error)) is not None:
            raise explained from None
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {advice}") from None


def make_folder(path: str | os.PathLike[str]) -> epath.Path:
    """Creates a folder if missing and checks that it is writable. Raises UserError."""
    folder = epath.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".writable-{uuid.uuid4().hex}"  # several processes may try at once
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise UserError(f"folder {path} is not writable ({error.strerror or error}); give another") from None
    return folder
