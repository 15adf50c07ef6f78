"""Locks: one process at a time writes a work directory, a data set or a file.

A folder's lock is the file `marjax.lock` in it; a file's lock is `NAME.lock` beside it. Local file systems and NFS have
`flock`, which is released when its process ends, however it ends. Elsewhere (gs://, mounts without locks) the lock is a
lease: its holder rewrites it every _REFRESH seconds, and another process takes it over if it does not change for _STALE
seconds. A holder that has lost its lease exits at once.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from etils import epath

from marjax.errors import UserError
from marjax.storage import explain, is_remote

NAME = "marjax.lock"  # in a folder

_PATIENCE = 3.0  # seconds; a killed process may take a moment to end
_ORPHAN_PATIENCE = 30.0  # seconds; children of a killed sweep end by themselves (see sweep.points.end_with_parent)
_REFRESH, _STALE = 20.0, 120.0  # seconds
_SURELY_STALE = 600.0  # seconds by the holder's clock, which may differ from this machine's
_POLL = 1.0
_MARK = b'{"marjax_lock": '  # start of the file, even if truncated by a full disk or written by another version
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str], command: str, name: str = NAME) -> Iterator[int | None]:
    """Holds the lock `folder/name`. Creates the folder if missing; then, if it stays empty, removes it at the end.

    Args, yields and raises: see `locked`.
    """
    path = epath.Path(folder)
    is_new = not is_remote(path) and not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be created ({error.strerror or error}); give a writable one") from None
    try:
        with locked(path / name, folder, command) as held:
            yield held
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(path)


@contextlib.contextmanager
def locked_file(path: str | os.PathLike[str], command: str) -> Iterator[int | None]:
    """Holds the lock of a file, which need not exist, in an existing folder. Args, yields and raises: see `locked`."""
    with locked(epath.Path(f"{os.fspath(path)}.lock"), path, command) as held:
        yield held


@contextlib.contextmanager
def locked(lock: epath.Path, target: str | os.PathLike[str], command: str) -> Iterator[int | None]:
    """Holds a lock, whose file is removed at the end.

    Args:
      lock: the lock file, local or gs://.
      target: the path it protects, for errors.
      command: the command that holds it, for errors in other processes.

    Yields:
      The file descriptor of the lock; a child process that inherits it holds the lock too. None for a lease.

    Raises:
      UserError: another process holds it (with host, process id and time), or the lock file cannot be created.
    """
    with contextlib.ExitStack() as stack:
        descriptor = None
        if is_remote(lock):
            stack.enter_context(_leased(_Object(lock), target, command))
        elif (descriptor := _flocked(os.fspath(lock), target, command)) is not None:
            stack.callback(_release, os.fspath(lock), descriptor)
        else:
            stack.enter_context(_leased(_PlainFile(f"{os.fspath(lock)}.lease"), target, command))
        yield descriptor


@dataclasses.dataclass(frozen=True)
class _Holder:
    """The holder of a lock, as its file describes it.

    Attributes:
      command: such as "marjax train".
      host, pid: host name and process id.
      since: when it acquired the lock, in seconds since 1970.
      boot, space, started: boot id, process namespace and start time; with host and pid they identify the process.
      token: unique to this lock.
      time: when the file was written, in seconds since 1970.
    """

    command: str
    host: str
    pid: int
    since: float
    boot: str
    space: str
    started: str
    token: str
    time: float

    @classmethod
    def here(cls, command: str) -> "_Holder":
        now = time.time()
        return cls(
            command, socket.gethostname(), os.getpid(), now, *_machine(), _started(os.getpid()), uuid.uuid4().hex, now
        )

    def to_bytes(self) -> bytes:
        return json.dumps({"marjax_lock": 1, **dataclasses.asdict(self)}).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> "_Holder | None":
        """None if the file is not (yet) a lock."""
        try:
            content = json.loads(data)
            fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            for name, value in fields.items():  # they are printed
                if name in ("pid", "since", "time"):
                    if not isinstance(value, int | float):
                        return None
                elif not isinstance(value, str) or not value.isprintable() or len(value) > 300:
                    return None
            return cls(**fields)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def is_dead(self) -> bool:
        """Whether the process ran on this machine and has ended."""
        here = (self.host, self.boot, self.space) == (socket.gethostname(), *_machine())
        return here and _started(self.pid) != self.started

    def __str__(self) -> str:
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        except (OverflowError, ValueError, OSError):
            since = "unknown"
        return f"{self.command} on host {self.host}, process {self.pid}, since {since}"


def _machine() -> tuple[str, str]:
    """The boot id of this machine and this process namespace; "" if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _started(pid: int) -> str:
    """The start time of a process of this machine, in clock ticks; "" if it does not run."""
    try:
        with open(f"/proc/{int(pid)}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie no longer writes
    except (OSError, ValueError, IndexError, OverflowError):
        return ""


def _refuse(target: str | os.PathLike[str], holder: _Holder | None) -> UserError:
    by = f"{holder}" if holder else "another process"
    if holder and holder.is_dead():
        by += " (which has ended, but a child process still runs)"
    end = f"end it (kill {holder.pid} on {holder.host})" if holder else "end it"
    return UserError(f"{os.fspath(target)} is being written by {by}; wait for it, or {end}")


def _flocked(path: str, target: str | os.PathLike[str], command: str) -> int | None:
    """Opens and locks a file; returns its descriptor, or None if the file system has no locks. Raises UserError."""
    begun = time.monotonic()
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file after it was opened here; a new file would be another lock.
            if _is(path, descriptor):
                before = os.pread(descriptor, 1 << 16, 0)
                if before.strip(b"\0\n") and not before.startswith(_MARK) and _Holder.parse(before) is None:
                    raise UserError(f"{path} is not a lock of marjax; move it away")
                with contextlib.suppress(OSError):  # a full disk; the lock is held anyway
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, _Holder.here(command).to_bytes(), 0)
                return descriptor
            os.close(descriptor)
            continue
        except BlockingIOError:
            holder = _Holder.parse(os.pread(descriptor, 1 << 16, 0))
            os.close(descriptor)
        except OSError as error:
            is_empty = not os.fstat(descriptor).st_size
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                if is_empty:  # created above; it locks nothing here
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                return None
            raise UserError(
                f"{path} cannot be locked ({error.strerror}); give a folder on another file system"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        is_orphaned = holder is not None and holder.is_dead()
        if time.monotonic() - begun > (_ORPHAN_PATIENCE if is_orphaned else _PATIENCE):
            raise _refuse(target, holder)
        time.sleep(0.05)


def _open(path: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a symbolic link; remove it") from None
        raise UserError(f"{path} cannot be created ({error.strerror}); give a writable folder") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a regular file; remove it")
    return descriptor


def _is(path: str, descriptor: int) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        current, opened = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (current.st_dev, current.st_ino) == (opened.st_dev, opened.st_ino)


def _release(path: str, descriptor: int) -> None:
    """Removes the lock file while it is held, then releases it."""
    with contextlib.suppress(OSError):
        if _is(path, descriptor):
            os.unlink(path)
    os.close(descriptor)


class _Cell(Protocol):
    """A file or object with compare-and-swap."""

    path: str

    def read(self) -> tuple[bytes, Any] | None:
        """The content and its version; None if it does not exist."""

    def write(self, data: bytes, version: Any) -> Any:
        """Writes if the current version is `version` (None: it does not exist). The new version, or None."""

    def remove(self, version: Any) -> None:
        """Removes it if the current version is `version`."""


@contextlib.contextmanager
def _leased(cell: _Cell, target: str | os.PathLike[str], command: str) -> Iterator[None]:
    try:
        holder = _Holder.here(command)
        lease = _Lease(cell, holder, _take(cell, holder, target))
    except UserError:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is None and isinstance(error, OSError):
            explained = UserError(f"{cell.path} cannot be created ({error.strerror or error}); give a writable folder")
        raise (explained or error) from None
    try:
        yield
    finally:
        lease.end()


def _take(cell: _Cell, holder: _Holder, target: str | os.PathLike[str]) -> Any:
    """Acquires the lease for `holder` and returns its version. Raises UserError."""
    seen, since, patience = None, 0.0, time.monotonic() + _PATIENCE
    announced = False
    while True:
        there = cell.read()
        if there is None:
            version = cell.write(holder.to_bytes(), None)
            if version is not None:
                return version
            continue
        data, version = there
        other, now = _Holder.parse(data), time.monotonic()
        if other is not None and other.token == holder.token:
            return version  # written by a request that seemed to fail
        if seen is None or version != seen[0]:
            if seen is not None and other is not None and other.token == seen[1]:
                raise _refuse(target, other)  # it was rewritten: its holder is alive
            seen, since = (version, other.token if other else ""), now
        stale = now - since >= _STALE or (
            other is not None and (other.is_dead() or time.time() - other.time >= _SURELY_STALE)
        )
        if stale and (taken := cell.write(holder.to_bytes(), version)) is not None:
            return taken
        if (
            other is not None
            and not stale
            and now > patience
            and ((other.host, *_machine()) == (socket.gethostname(), other.boot, other.space))
        ):
            raise _refuse(target, other)  # it is alive, on this machine
        if not announced and now > patience:
            announced = True
            print(
                f"marjax: {os.fspath(target)} is locked by {other or 'another process'}: waiting up to {_STALE:.0f} s "
                f"to see whether it is alive",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL)


class _Lease:
    """Rewrites the lease in a thread, until `end`."""

    def __init__(self, cell: _Cell, holder: _Holder, version: Any) -> None:
        self._cell, self._holder, self._version = cell, holder, version
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="marjax-lock", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Releases the lease."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # then it becomes stale
            self._cell.remove(self._version)

    def _refresh(self) -> None:
        while not self._over.wait(_REFRESH):
            data = dataclasses.replace(self._holder, time=time.time()).to_bytes()
            try:
                version = self._cell.write(data, self._version)
                if version is None:
                    there = self._cell.read()
                    other = _Holder.parse(there[0]) if there else None
                    if there is not None and other is not None and other.token == self._holder.token:
                        version = there[1]  # written by a request that seemed to fail
            except Exception:
                continue  # storage does not answer; the run itself will fail
            if version is None:
                print(
                    f"marjax: error: {self._cell.path} was taken over by {other or 'another process'}, since this "
                    f"process could not refresh it; exiting, so that only one process writes",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            self._version = version


class _PlainFile:
    """A file on a file system without locks. Its version is its content."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self) -> tuple[bytes, bytes] | None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with open(descriptor, "rb") as file:
            data = file.read()
        return data, data

    def write(self, data: bytes, version: bytes | None) -> bytes | None:
        if version is None:
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:
                return None
            with open(descriptor, "wb") as file:
                file.write(data)
            return data
        if self.read() != (version, version):
            return None
        partial = f"{self.path}.partial{uuid.uuid4().hex}"
        try:
            with open(partial, "xb") as file:
                file.write(data)
            os.replace(partial, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(partial)
            raise
        before, after = _Holder.parse(version), _Holder.parse(data)
        if before is not None and after is not None and before.token != after.token:
            time.sleep(2 * _POLL)  # of two processes that take it over at once, the last wins
            return data if self.read() == (data, data) else None
        return data

    def remove(self, version: bytes) -> None:
        if self.read() == (version, version):
            os.unlink(self.path)


class _Object:
    """An object in a bucket. Its version is its generation."""

    def __init__(self, path: epath.Path) -> None:
        import fsspec
        from fsspec.asyn import sync

        self.path = os.fspath(path)
        self._client: Any = fsspec.filesystem("gcs", finalize_on_close=True)  # the same client as etils uses
        self._sync = sync
        self._bucket, _, self._key = self.path.removeprefix("gs://").partition("/")

    def _call(self, method: str, path: str, *names: str, **query: Any) -> Any:
        return self._sync(self._client.loop, self._client._call, method, path, *names, **query)

    def read(self) -> tuple[bytes, str] | None:
        try:
            headers, data = self._call("GET", "b/{}/o/{}", self._bucket, self._key, alt="media")
        except FileNotFoundError:
            return None
        return data, str({key.lower(): value for key, value in headers.items()}["x-goog-generation"])

    def write(self, data: bytes, version: str | None) -> str | None:
        path = f"{self._client._location}/upload/storage/v1/b/{{}}/o"
        try:
            made = self._call(
                "POST",
                path,
                self._bucket,
                uploadType="media",
                name=self._key,
                ifGenerationMatch=version or "0",
                data=data,
                json_out=True,
            )
        except FileExistsError:  # the client's error for "precondition failed"
            return None
        return str(made["generation"])

    def remove(self, version: str) -> None:
        self._call("DELETE", "b/{}/o/{}", self._bucket, self._key, ifGenerationMatch=version)
