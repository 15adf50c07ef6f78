"""Reads weights files: PyTorch's two formats and safetensors, recognized by their first bytes, not by their name."""

import dataclasses
import os
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from marjax.errors import UserError, first_line, shortened
from marjax.files import open_regular
from marjax.interop import pytorch, sharded
from marjax.interop.pytorch import AGAIN, Tensor
from marjax.interop.unpickle import Budget
from marjax.paths import takes_paths

_BEGINNINGS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file that it points to: run git lfs pull in its "
    "repository, or download the file itself",
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"\x93NUMPY": "is a NumPy array: give a PyTorch checkpoint or a safetensors file",
    b"\x89HDF": "is an HDF5 file: give a PyTorch checkpoint or a safetensors file",
    b"PK\x05\x06": "is an empty zip file: " + AGAIN,
}
_MAX_HEADER = 10_000_000  # bytes of a safetensors file's header; 100 or so a tensor
_SAFETENSORS_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "U64": np.uint64,
    "I32": np.int32,
    "U32": np.uint32,
    "I16": np.int16,
    "U16": np.uint16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """The contents of a weights file.

    Attributes:
      content: the object from `pytorch.read`, or for safetensors a dict of name -> `Tensor`.
      metadata: safetensors metadata; None for PyTorch and for shards.
      size: bytes of the file, or of all shards together.
    """

    content: Any
    metadata: dict[str, str] | None
    size: int | None = None


@takes_paths("path")
def read(path: str | os.PathLike[str]) -> WeightsFile:
    """Reads a local file; tensors are read later, by `np.asarray`.

    Args:
      path: a file, the index of a sharded checkpoint, or a folder with either.

    Raises:
      UserError: the file is missing or of another kind, which the error names.
    """
    path = os.fspath(path)
    if "://" in path:
        raise UserError(f"{path} is no local file: copy it to this machine first")
    if os.path.isdir(path):
        path = sharded.file_of(path)
    try:
        budget, sizes = Budget(), []
        if not path.endswith(sharded.SUFFIX):
            return _read(path, budget)

        def read_shard(path: str) -> dict[str, Tensor]:
            shard = _read(path, budget)
            sizes.append(shard.size or 0)
            if not isinstance(shard.content, dict) or not all(
                isinstance(name, str) and isinstance(each, Tensor) for name, each in shard.content.items()
            ):
                raise UserError(f"{path} holds something else than tensors by name, so it is no shard: {AGAIN}")
            return shard.content

        return WeightsFile(sharded.read(path, read_shard), None, sum(sizes))
    except MemoryError:
        raise UserError(f"{path} needs more memory than there is: {AGAIN}, or use a machine with more") from None


def _read(path: str, budget: Budget) -> WeightsFile:
    try:
        with open_regular(path) as file:
            start = file.read(1024)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the file of a checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give a file that can") from None
    if not start:
        raise UserError(f"{path} is empty: {AGAIN}")
    for beginning, what in _BEGINNINGS.items():
        if start.startswith(beginning):
            raise UserError(f"{path} {what}")
    if start[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it first")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise UserError(
            f"{path} is a web page, not a checkpoint: the link leads to a page with a download button, or "
            f"to an error; download the file itself (of Dropbox, with dl=1 at the link's end)"
        )
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER:
        return _read_safetensors(path, size)
    if start[0] in b"P\x80":
        return WeightsFile(pytorch.read(path, budget), None, size)
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        raise UserError(f"{path} is a text, not a checkpoint (it begins with {start[:60].decode()!r}): {AGAIN}")
    raise UserError(
        f"{path} is neither a PyTorch checkpoint nor a safetensors file (it begins with the bytes "
        f"{start[:8].hex(' ')}): give one of these, or {AGAIN}"
    )


def _read_safetensors(path: str, size: int) -> WeightsFile:
    try:
        handle = safetensors.safe_open(path, framework="numpy")
        tensors = {}
        for name in handle.keys():  # noqa: SIM118 - not a dict
            each = handle.get_slice(name)
            if len(each.get_shape()) > pytorch.MAX_DIMS:
                raise UserError(
                    f"{path} has a tensor {shortened(name)!r} of {len(each.get_shape())} dimensions, of at "
                    f"most {pytorch.MAX_DIMS}: it is damaged or hostile"
                )
            if each.get_dtype() not in _SAFETENSORS_TYPES:
                raise UserError(
                    f"{path} has a tensor {shortened(name)!r} of type {each.get_dtype()}, which this "
                    f"program cannot read: convert it to float32 or bfloat16 first"
                )

            def load(name: str = name) -> np.ndarray:
                return handle.get_tensor(name)

            tensors[name] = Tensor(tuple(each.get_shape()), np.dtype(_SAFETENSORS_TYPES[each.get_dtype()]), load)
        return WeightsFile(tensors, handle.metadata() or {}, size)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the exceptions of its Rust code are not documented
        raise UserError(
            f"{path} begins as a safetensors file, but is damaged or cut short ({first_line(error)[:120]}; "
            f"it has {size} bytes): {AGAIN}"
        ) from None
