"""Reads untrusted npz and npy files: no code in them runs, and sizes are checked before memory is allocated.

`np.load` allocates what a header claims. Here a member's header must match the member's size, and that the file's size.
"""

import contextlib
import io
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from marjax.closeable import Closeable
from marjax.errors import UserError, shortened
from marjax.files import open_regular
from marjax.storage import explain

MAX_RATIO = 100  # of a member's size to its compressed size
_SMALL = 64 << 20  # bytes; the ratio of smaller members is not checked
_MAX_DIRECTORY = 4 << 20  # bytes of the list of members
_MAX_HEADER = 10_000  # bytes, as in NumPy
_MAX_AXIS, _MAX_DIMS = 1 << 48, 32
_BLOCK = 1 << 20
_KINDS = {
    "b": "booleans",
    "i": "integers",
    "u": "unsigned integers",
    "f": "floats",
    "U": "text",
    "S": "bytes",
    "c": "complex numbers",
}

# Expected array: allowed letters of `np.dtype.kind`, and the number of dimensions, None for any.
Kind = tuple[str, int | None]
PLAIN = "biufUS"
NUMBERS = "iuf"


class Header(NamedTuple):
    """Shape and dtype of an array, whether it is in Fortran order, and the offset and size of its data in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    start: int
    nbytes: int


def read_npz(
    path: str | os.PathLike[str], arrays: Mapping[str, Kind] | None = None, *, advice: str, max_ratio: int = MAX_RATIO
) -> dict[str, np.ndarray]:
    """Reads arrays of an npz file, local or gs://.

    Args:
      path: path of the file.
      arrays: kinds and number of dimensions of the arrays to read, such as {"mu": ("f", 1), "meta?": ("U", 0)};
        an array whose name ends in ? may be missing. By default all arrays of any kind.
      advice: how to fix an invalid file; the end of every error.
      max_ratio: refuse members over 64 MiB with a higher compression ratio.

    Returns:
      The arrays found, by name, in C order and native byte order.

    Raises:
      UserError: the file is missing, unreadable, damaged or not an npz file, or an array is missing or does not match
        `arrays`.
      StorageError: gs:// does not answer.
    """
    with NpzFile(path, advice=advice, max_ratio=max_ratio) as file:
        wanted = arrays if arrays is not None else dict.fromkeys(file.names, (PLAIN, None))
        return {
            name: file.read(name, kind)
            for name, kind in (
                (key.removesuffix("?"), kind)
                for key, kind in wanted.items()
                if not key.endswith("?") or key[:-1] in file.names
            )
        }


def read_npy(path: str | os.PathLike[str], kind: Kind = (PLAIN, None), *, advice: str) -> np.ndarray:
    """Reads an npy file, local or gs://. Raises UserError and StorageError as `read_npz` does."""
    where = os.fspath(path)
    with _explained(where, advice), open_regular(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return _read(file, _header(file, size, where, kind, advice), where, advice)


class NpzFile(Closeable):
    """An open npz file, whose arrays are read one by one.

    Attributes:
      path: path of the file.
      names: names of its arrays, in file order; other members are ignored.
    """

    def __init__(self, path: str | os.PathLike[str], *, advice: str, max_ratio: int = MAX_RATIO) -> None:
        """Reads the list of members; see `read_npz`. Raises UserError, StorageError."""
        self.path, self._advice, self._max_ratio = os.fspath(path), advice, max_ratio
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack, _explained(self.path, advice):
            file = stack.enter_context(open_regular(path))
            self._size = file.seek(0, io.SEEK_END)
            _check_directory(file, self._size, self.path, advice)
            self._archive = stack.enter_context(zipfile.ZipFile(file))
            self._stack = stack.pop_all()
        members = [info for info in self._archive.infolist() if info.filename.endswith(".npy")]
        self._members = {info.filename.removesuffix(".npy"): info for info in members}
        self.names = tuple(self._members)
        if len(members) > len(self._members):
            self._stack.close()
            raise UserError(f"{self.path} is damaged (two arrays have the same name); {advice}")

    def close(self) -> None:
        self._stack.close()

    def header(self, name: str, kind: Kind = (PLAIN, None)) -> Header:
        """Reads the header of an array. Raises UserError as `read_npz` does."""
        with self.stream(name, kind) as (_, header):
            return header

    def read(self, name: str, kind: Kind = (PLAIN, None)) -> np.ndarray:
        """Reads an array in C order. Raises UserError as `read_npz` does."""
        with self.stream(name, kind) as (file, header):
            return _read(file, header, f"{self.path}: {shortened(name)}", self._advice)

    @contextlib.contextmanager
    def stream(self, name: str, kind: Kind = (PLAIN, None)) -> Iterator[tuple[BinaryIO, Header]]:
        """Yields a file at the start of an array's data, to read it in parts.

        Errors of reading become UserErrors, as in `read_npz`.
        """
        where, advice, info = f"{self.path}: {shortened(name)}", self._advice, self._members.get(name)
        if info is None:
            names = ", ".join(shortened(each) for each in self.names[:20])
            raise UserError(f"{self.path} has no {shortened(name)}, only {names or 'none at all'}; {advice}")
        if info.flag_bits & 1:
            raise UserError(f"{where} is encrypted; {advice}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{where} has compression method {info.compress_type}, expected none or deflate, as np.savez "
                f"writes it; {advice}"
            )
        stored = info.compress_type == zipfile.ZIP_STORED
        if info.header_offset + info.compress_size > self._size or (stored and info.compress_size != info.file_size):
            raise UserError(f"{where} is damaged (impossible size); {advice}")
        if info.file_size > max(_SMALL, self._max_ratio * info.compress_size):
            raise UserError(
                f"{where} is compressed more than {self._max_ratio} times, from {info.file_size} bytes; {advice}"
            )
        with _explained(where, advice), self._archive.open(info) as file:
            yield file, _header(file, info.file_size, where, kind, advice)  # type: ignore[arg-type, misc]


def _check_directory(file: BinaryIO, size: int, path: str, advice: str) -> None:
    """Refuses a zip directory that would itself fill the memory."""
    file.seek(max(0, size - (1 << 16) - 1024))
    tail = file.read()
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    if end < 0 or len(tail) < end + 16:
        begins = "an npy file, one array" if _begins(file) == b"\x93NUMPY" else "not an npz file, or truncated"
        raise UserError(f"{path} is {begins}; {advice}")
    (length,) = struct.unpack_from("<L", tail, end + 12)
    if 0 <= end64 <= len(tail) - 48:
        length = max(0 if length == 0xFFFFFFFF else length, *struct.unpack_from("<Q", tail, end64 + 40))
    if length > _MAX_DIRECTORY:
        raise UserError(f"{path} has a zip directory of {length} bytes, expected a few arrays; {advice}")


def _begins(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(6)


def _header(file: BinaryIO, size: int, where: str, kind: Kind, advice: str) -> Header:
    """Reads and checks the header of an array whose file has `size` bytes. Raises UserError."""
    start = file.read(12)
    major, length = start[6:7], 0
    if start[:6] != b"\x93NUMPY" or len(start) < 12 or major not in (b"\1", b"\2", b"\3"):
        raise UserError(f"{where} is not an array in NumPy's format; {advice}")
    prefix, format_ = (10, "<H") if major == b"\1" else (12, "<L")
    (length,) = struct.unpack_from(format_, start, 8)
    if length > _MAX_HEADER:
        raise UserError(f"{where} has a header of {length} bytes, expected at most {_MAX_HEADER}; {advice}")
    data = io.BytesIO(start + file.read(prefix + length - 12))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(data)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(data, max_header_size=_MAX_HEADER)
    except Exception as error:  # it evaluates a literal and makes a dtype, which may raise almost anything
        raise UserError(f"{where} has a damaged header ({shortened(str(error))}); {advice}") from None
    if dtype.hasobject:
        raise UserError(f"{where} cannot be read (it holds pickled objects, which could run code); {advice}")
    kinds, ndim = kind
    fits = dtype.kind in kinds and not dtype.names and dtype.itemsize > 0
    if (
        not fits
        or len(shape) != (min(len(shape), _MAX_DIMS) if ndim is None else ndim)
        or not all(0 <= axis < _MAX_AXIS for axis in shape)
    ):
        allowed = " or ".join(_KINDS[each] for each in kinds)
        raise UserError(
            f"{where} is {shortened(f'{dtype} {shape}')}, expected {allowed}"
            f"{'' if ndim is None else f' with {ndim} axes'}; {advice}"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if data.tell() + nbytes != size:
        raise UserError(
            f"{where} is damaged: it has {size - data.tell()} bytes, but its header has "
            f"{shortened(str(shape))} of {dtype}; {advice}"
        )
    return Header(tuple(map(int, shape)), dtype, bool(fortran), data.tell(), nbytes)


def _read(file: BinaryIO, header: Header, where: str, advice: str) -> np.ndarray:
    data = bytearray(header.nbytes)
    view, done = memoryview(data), 0
    while done < header.nbytes:
        block = file.read(min(_BLOCK, header.nbytes - done))
        if not block:
            raise UserError(f"{where} is damaged: it ends after {done} of {header.nbytes} bytes; {advice}")
        view[done : done + len(block)] = block
        done += len(block)
    file.read(1)  # at the end of a member, zipfile verifies its checksum
    if not header.nbytes:
        return np.zeros(header.shape, header.dtype)
    flat = np.frombuffer(data, header.dtype)
    flat = flat.astype(header.dtype.newbyteorder("="), copy=False)
    if header.dtype.kind == "U" and flat.view(np.uint32).max() > 0x10FFFF:
        raise UserError(f"{where} is damaged: it has text with invalid characters; {advice}")
    if header.fortran:
        return flat.reshape(header.shape, order="F").copy(order="C")
    return flat.reshape(header.shape)


@contextlib.contextmanager
def _explained(where: str, advice: str) -> Iterator[None]:
    """Turns errors of reading into UserErrors: a damaged zip file raises almost anything."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{where} does not exist; {advice}") from None
    except MemoryError:
        raise UserError(f"{where} needs more memory than is available; {advice}") from None
    except Exception as error:
        if (explained := explain(error)) is not None:
            raise explained from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise UserError(f"{where} cannot be read ({shortened(reason)}); {advice}") from None
