"""PyTorch files without PyTorch: what `torch.save` writes, in its zip format and in the one before version 1.6.

A file is a pickle that refers to storages, followed by their raw bytes. Only the pickle is read at first: tensors are
read one by one when used, so memory holds one copy. Sizes are checked against the file before anything is allocated.
"""

import argparse
import dataclasses
import errno
import io
import itertools
import logging
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from marjax.errors import UserError, shortened
from marjax.files import open_regular
from marjax.interop import unpickle
from marjax.interop.unpickle import Budget, Function, PickleError, Refused

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before 1.6
MAX_DIMS = 32
_MAX_EXPANDED = 1 << 20  # elements of a view that repeats its storage's
_MAX_DIRECTORY = 1 << 24  # bytes of a zip file's list of members; 100 or so a storage
_MAX_KEY = 1000  # characters of the name of a storage
_SHOWN = 5  # names in a warning
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
AGAIN = "download or copy it again"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file; `np.asarray` reads it. `dtype` may be one of ml_dtypes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype)


class Foreign(Refused):
    """Stands for an object in a file that is neither plain data nor a tensor; reading it as an array is an error."""

    __slots__ = ("path",)

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        self.path = path

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise UserError(
            f"{self.path} asks for {shortened(self.name, 120)!r} where a tensor was expected, which is not "
            f"among the names that a file of weights needs, so nothing of it was run: save its weights as "
            f"a plain dict of tensors"
        )


def read(path: str | os.PathLike[str], budget: Budget | None = None) -> Any:
    """What `torch.save` was given: dicts, lists, tuples, numbers, strings and argparse.Namespace, with `Tensor`s.

    Parameters are tensors, an OrderedDict is a dict, torch.Size a tuple, torch.device a string, a torch.dtype NumPy's.
    Objects of other classes, such as those of optimizers, are a `Foreign`: nothing of them is imported or run.

    Args:
      path: of a local file, which must stay in place while its tensors are read.
      budget: of the work, shared by files that are read together; by default a new one.

    Raises:
      UserError: it cannot be opened, is neither format, is damaged, or takes more work or memory than weights do.
        Reading a tensor raises one too, where its bytes are not those that were written.
    """
    path, budget = os.fspath(path), budget or Budget()
    names: dict[str, None] = {}

    def foreign(name: str) -> Foreign:
        if len(names) <= _SHOWN:
            names[name] = None
        return Foreign(name, path)

    try:
        with open_regular(path) as file:
            start = file.read(4)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            content = (_read_zip if start == b"PK\x03\x04" else _read_legacy)(file, path, size, foreign, budget)
        if names:
            shown = [shortened(name) for name in names][:_SHOWN] + ["others"] * (len(names) > _SHOWN)
            _log.warning(
                "%s holds objects besides its tensors (%s): they are ignored, and nothing of them was run",
                path,
                ", ".join(shown),
            )
        return content
    except PickleError as error:
        raise UserError(
            f"{path} cannot be read as a PyTorch file: its pickle {error}. If you trust its source, "
            f"{AGAIN}, or save its weights there as a plain dict of tensors"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give a file that can") from None
    except MemoryError:
        raise UserError(f"{path} needs more memory than there is: {AGAIN}, or use a machine with more") from None


class _Region:
    """Bytes of the file that one storage occupies; for the older format the place is known only after the pickle."""

    def __init__(self, path: str, start: int, size: int, crc: int | None) -> None:
        self.path, self.start, self.size, self.crc = path, start, size, crc

    def read(self, first: int, last: int) -> np.ndarray:
        """The bytes [first, last) as uint8; the whole region is checked once, where its checksum is known."""
        whole = self.crc is not None
        begin, end = (0, self.size) if whole else (first, last)
        data = np.empty(end - begin, np.uint8)
        try:
            with open_regular(self.path) as file:
                file.seek(self.start + begin)
                got = file.readinto(data)  # type: ignore[attr-defined]
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error}): {AGAIN}") from None
        if got != len(data):
            raise UserError(f"{self.path} became shorter while it was read: {AGAIN}")
        if whole:
            if zlib.crc32(data.data) != self.crc:
                raise UserError(
                    f"{self.path} is damaged: the checksum of the {self.size} bytes at {self.start} is "
                    f"wrong: {AGAIN} (or save it with torch.serialization.set_crc32_options(True))"
                )
            self.crc = None
            if (first, last) != (0, self.size):
                data = data[first:last].copy()  # so that the rest can go
        return data


@dataclasses.dataclass(frozen=True)
class _Storage:
    """`numel` elements of `dtype` from element `offset` of a region; for untyped storages, bytes."""

    region: _Region
    dtype: np.dtype
    offset: int
    numel: int
    swapped: bool


# --- The two formats -------------------------------------------------------------------------------------------------


def _read_zip(file: BinaryIO, path: str, size: int, foreign: Callable[[str], Foreign], budget: Budget) -> Any:
    members = _members(file, path, size)
    budget.spend(len(members))
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(
            f"{path} is a zip file with {len(pickles)} members data.pkl (of {len(members)}), so torch.save "
            f"has not written it: give a PyTorch checkpoint or a safetensors file"
        )
    folder = pickles[0].removesuffix("data.pkl")
    order = b"little"
    if (place := members.get(f"{folder}byteorder")) is not None:
        order = bytes(place.read(0, place.size)) if place.size < 10 else b"a long text"
    if order not in (b"little", b"big"):
        raise UserError(f"{path} is damaged: its byte order is {order!r}: {AGAIN}")

    def storage(dtype: np.dtype, key: str, numel: int, view: Any) -> _Storage:
        if view is not None or f"{folder}data/{key}" not in members:
            raise PickleError(f"refers to the storage {shortened(key)!r}, which the file does not have")
        region = members[f"{folder}data/{key}"]
        if numel * dtype.itemsize != region.size:
            raise PickleError(
                f"says that storage {shortened(key)!r} has {numel} elements of {dtype}, but it has {region.size} bytes"
            )
        return _Storage(region, dtype, 0, numel, order == b"big")

    region = members[pickles[0]]
    if region.size > unpickle.MAX_STRING:
        raise PickleError(f"has {region.size} bytes, where a list of tensors has a few million at most")
    data = io.BytesIO(region.read(0, region.size).tobytes())
    return unpickle.load(data, _KNOWN, _BUILDERS, _persistent(storage, size), refused=foreign, budget=budget)


class _Limited:
    """A file for zipfile, which reads a list of members at once, however long the file says that it is."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_DIRECTORY:
            raise PickleError(f"is in a zip file with a list of members of {size} bytes, which no checkpoint has")
        return self.file.read(size)


def _members(file: BinaryIO, path: str, size: int) -> dict[str, _Region]:
    """Where each member of a zip file lies. Raises UserError: it is damaged, or not as torch.save writes it."""
    try:
        with zipfile.ZipFile(_Limited(file)) as archive:
            entries, directory = archive.infolist(), archive.start_dir
    except (PickleError, MemoryError):
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a damaged directory makes it seek to places that there are not
            raise
        entries = None
    except Exception:  # a damaged zip file raises almost anything
        entries = None
    if entries is None:
        raise UserError(
            f"{path} begins as a PyTorch file, but its end is missing or damaged (it has {size} bytes): "
            f"the download was probably interrupted, {AGAIN}"
        )
    members: dict[str, _Region] = {}
    ranges = []
    for entry in entries:
        name = entry.filename
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise UserError(
                f"{path} has a compressed or encrypted member {shortened(name)!r}, which torch.save does "
                f"not write: give the file as it was published, or unpack it first if it was zipped once "
                f"more"
            )
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        start = end = size + 1
        if len(header) == _LOCAL_HEADER.size:
            signature, _, _, method, *_, name_size, extra_size = _LOCAL_HEADER.unpack(header)
            if signature == b"PK\x03\x04" and method == zipfile.ZIP_STORED:
                start = entry.header_offset + _LOCAL_HEADER.size + name_size + extra_size
                end = start + entry.file_size
        if end > directory or name in members:
            raise UserError(
                f"{path} is damaged: its member {shortened(name)!r} is there twice or lies outside of the file: {AGAIN}"
            )
        members[name] = _Region(path, start, entry.file_size, entry.CRC)
        ranges.append((entry.header_offset, end, name))
    ranges.sort()
    for (_, end, name), (following, _, other) in itertools.pairwise(ranges):
        if following < end:
            raise UserError(
                f"{path} is damaged: its members {shortened(name)!r} and {shortened(other)!r} overlap: {AGAIN}"
            )
    return members


def _read_legacy(file: BinaryIO, path: str, size: int, foreign: Callable[[str], Foreign], budget: Budget) -> Any:
    def refuse(pid: Any) -> Any:
        raise PickleError("is damaged (a storage where there can be none)")

    def plain() -> Any:
        return unpickle.load(file, {}, {}, refuse, budget=budget)

    try:
        magic = plain()
    except PickleError:
        magic = None
    if magic != _MAGIC:
        raise UserError(
            f"{path} is no PyTorch file (it begins with neither of the two formats of torch.save): give a "
            f"PyTorch checkpoint or a safetensors file"
        )
    if plain() != _PROTOCOL:
        raise UserError(f"{path} has another version of PyTorch's older format than {_PROTOCOL}: {AGAIN}")
    system = plain()
    if not isinstance(system, dict) or not isinstance(system.get("little_endian"), bool):
        raise UserError(f"{path} is damaged: it does not tell its byte order: {AGAIN}")
    roots: dict[str, tuple[_Region, np.dtype, int]] = {}

    def storage(dtype: np.dtype, key: str, numel: int, view: Any) -> _Storage:
        region, _, _ = roots.setdefault(key, (_Region(path, 0, 0, None), dtype, numel))
        if roots[key][1:] != (dtype, numel):
            raise PickleError(f"says two different things about the storage {shortened(key)!r}")
        offset, length = 0, numel
        if view is not None:
            if type(view) is not tuple or len(view) != 3 or not _are_sizes(view[1:]) or view[1] + view[2] > numel:
                raise PickleError(f"has a view outside of the storage {shortened(key)!r}")
            _, offset, length = view
        return _Storage(region, dtype, offset, length, not system["little_endian"])

    content = unpickle.load(file, _KNOWN, _BUILDERS, _persistent(storage, size), refused=foreign, budget=budget)
    keys = plain()
    if (
        type(keys) is not list
        or not all(isinstance(key, str) and len(key) <= _MAX_KEY for key in keys)
        or sorted(keys) != sorted(roots)
    ):
        raise PickleError("does not refer to the storages that the file lists")
    for key in keys:
        region, dtype, numel = roots[key]
        count = file.read(8)
        region.start, region.size = file.tell(), numel * dtype.itemsize
        if len(count) < 8 or region.start + region.size > size:
            raise UserError(
                f"{path} ends in the middle of its weights (it has {size} bytes, and needs "
                f"{region.start + region.size} or more): the download was probably interrupted, {AGAIN}"
            )
        if int.from_bytes(count, "little" if system["little_endian"] else "big") != numel:
            raise UserError(
                f"{path} is damaged: the storage {shortened(key)!r} has another size than its tensors say: {AGAIN}"
            )
        file.seek(region.start + region.size)
    return content


# --- What a file may name --------------------------------------------------------------------------------------------


def _are_sizes(values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _is_text(value: Any, *texts: str) -> bool:
    """Whether it is one of these; objects of a stranger are never compared or printed before it is known what they are.

    Nested tuples that share their parts take exponential time for both.
    """
    return isinstance(value, str) and value in texts


def _persistent(storage: Callable[[np.dtype, str, int, Any], _Storage], file_size: int) -> Callable[[Any], _Storage]:
    """From ("storage", type, key, device, number of elements[, view]) to the storage."""

    def load(pid: Any) -> _Storage:
        if type(pid) is tuple and pid and _is_text(pid[0], "module"):
            raise PickleError("holds a whole Python module, which is refused: save its state_dict() instead")
        if type(pid) is not tuple or len(pid) not in (5, 6) or not _is_text(pid[0], "storage"):
            raise PickleError("is damaged (it refers to something that is no storage)")
        _, dtype, key, _, numel, *view = pid
        if (
            not isinstance(dtype, _StorageType)
            or not isinstance(key, str)
            or len(key) > _MAX_KEY
            or not _are_sizes([numel])
        ):
            raise PickleError("is damaged (it describes a storage in another way than torch.save)")
        if numel * dtype.dtype.itemsize > file_size:
            raise PickleError(
                f"says that the storage {shortened(key)!r} has {numel} elements, which the file of "
                f"{file_size} bytes cannot hold: it is cut short or hostile"
            )
        return storage(dtype.dtype, key, numel, view[0] if view else None)

    return load


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None) -> Tensor:
    """A view of a storage, checked against its bounds; `dtype` is given for untyped storages."""
    if (
        not isinstance(storage, _Storage)
        or type(shape) is not tuple
        or type(strides) is not tuple
        or len(shape) != len(strides)
        or len(shape) > MAX_DIMS
        or not _are_sizes((offset, *shape, *strides))
    ):
        raise PickleError("is damaged (it describes a tensor in another way than torch.save)")
    itemsize, numel = storage.dtype.itemsize, storage.numel
    if dtype is not None and dtype != storage.dtype:
        if itemsize != 1:
            raise PickleError("is damaged (a tensor of another type than its storage)")
        itemsize, numel = dtype.itemsize, storage.numel // dtype.itemsize
    found = storage.dtype if dtype is None else dtype
    size = math.prod(shape)
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if size else offset
    if end > numel or (size > numel and size > _MAX_EXPANDED):
        raise PickleError(
            f"has a tensor of shape {shape} with strides {strides} from element {offset} on, which does "
            f"not fit its storage of {numel} elements: it is damaged or hostile"
        )
    first = storage.offset * storage.dtype.itemsize + offset * itemsize

    def load() -> np.ndarray:
        if not size:
            return np.empty(shape, found)
        try:
            return view()
        except MemoryError:
            raise UserError(
                f"{storage.region.path} needs more memory than there is, for a tensor of shape {shape}: "
                f"use a machine with more"
            ) from None

    def view() -> np.ndarray:
        data = storage.region.read(first, first + (end - offset) * itemsize)
        if storage.swapped:
            unit = itemsize // 2 if found.kind == "c" else itemsize
            data = np.ascontiguousarray(data.reshape(-1, unit)[:, ::-1]).reshape(-1)
        # A byte other than 0 and 1 is no bool to NumPy.
        flat = data != 0 if found == np.bool_ else data.view(found)
        array = np.lib.stride_tricks.as_strided(flat, shape, [stride * itemsize for stride in strides])
        return np.ascontiguousarray(array).reshape(shape)

    return Tensor(shape, found, load)


def _rebuild_v1(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    return _rebuild(storage, offset, shape, strides)


def _rebuild_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    return _rebuild(storage, offset, shape, strides)


def _rebuild_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    if not isinstance(dtype, np.dtype):
        raise PickleError("is damaged (a tensor without a dtype)")
    return _rebuild(storage, offset, shape, strides, dtype)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise PickleError("is damaged (a parameter that is no tensor)")
    return data


def _parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> Tensor:
    del state  # its attributes
    return _parameter(data, requires_grad, hooks)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, or of a class of its own, which is not looked at."""
    if isinstance(function, Refused):
        return function
    if function not in (_KNOWN["torch._utils", name] for name in _REBUILD) or type(arguments) is not tuple:
        raise PickleError("is damaged (it makes a tensor in another way than torch.save)")
    return function.call(*arguments)


def _default_dict(factory: Any = None) -> dict[Any, Any]:
    return {}


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    if any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
        raise PickleError("is damaged (an OrderedDict of something else than pairs)")
    return unpickle.as_dict([item for pair in pairs for item in pair])


def _size(shape: Any) -> tuple[int, ...]:
    if type(shape) is not tuple or not _are_sizes(shape):
        raise PickleError("is damaged (a torch.Size that is none)")
    return shape


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise PickleError("is damaged (a torch.device that is none)")
    return kind if index is None else f"{kind}:{index}"


class _NumpyType:
    """A numpy.dtype on its way: the constructor's text, then a state that says the byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not _is_text(code, "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
            raise PickleError(
                f"asks for the NumPy type {code[:40] if isinstance(code, str) else type(code).__name__!r}"
                f", which is refused"
            )
        self.dtype = np.dtype(f"<{code}")

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or not _is_text(state[1], "<", ">", "|"):
            raise PickleError("is damaged (a NumPy type in a way that is not known)")
        self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(kind: Any, data: Any) -> Any:
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise PickleError("is damaged (a NumPy number that is none)")
    return np.frombuffer(data, kind.dtype)[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes in protocol 2.
    if not isinstance(text, str) or not _is_text(encoding, "latin1"):
        raise PickleError("asks for an encoding other than latin1, which is refused")
    return text.encode("latin1", errors="replace")


def _set_attributes(namespace: argparse.Namespace, state: Any) -> None:
    if type(state) is not dict or not all(isinstance(name, str) and not name.startswith("__") for name in state):
        raise PickleError("sets attributes of an argparse.Namespace that no program has, which is refused")
    vars(namespace).update(state)


def _namespace() -> argparse.Namespace:
    return argparse.Namespace()


_DTYPES: Mapping[str, Any] = {
    "float64": np.float64,
    "double": np.float64,
    "float32": np.float32,
    "float": np.float32,
    "float16": np.float16,
    "half": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "int16": np.int16,
    "short": np.int16,
    "int32": np.int32,
    "int": np.int32,
    "int64": np.int64,
    "long": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
_STORAGES: Mapping[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "UntypedStorage": np.uint8,
}

_REBUILD: Mapping[str, Callable[..., Tensor]] = {
    "_rebuild_tensor": _rebuild_v1,
    "_rebuild_tensor_v2": _rebuild_v2,
    "_rebuild_tensor_v3": _rebuild_v3,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter_with_state,
}

# Python 2 and old versions of NumPy and Lightning are there because the public LDM checkpoints name them.
_KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Function(_ordered_dict),
    ("collections", "defaultdict"): Function(_default_dict),
    ("argparse", "Namespace"): Function(_namespace),
    ("torch", "Size"): Function(_size),
    ("torch", "device"): Function(_device),
    **{("torch._utils", name): Function(call) for name, call in _REBUILD.items()},
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_rebuild_from_type),
    **{("torch", name): np.dtype(kind) for name, kind in _DTYPES.items()},
    **{
        (module, name): _StorageType(np.dtype(kind))
        for name, kind in _STORAGES.items()
        for module in ("torch", "torch.cuda", "torch.storage")
    },
    ("numpy", "dtype"): Function(_NumpyType),
    ("numpy.core.multiarray", "scalar"): Function(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): Function(_numpy_scalar),
    ("_codecs", "encode"): Function(_encode),
    # A class as the key of a dict: its name will do.
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): "ModelCheckpoint",
}


def _ignore_attributes(content: dict[Any, Any], state: Any) -> None:
    """The `_metadata` of a state dict: versions of modules."""


_BUILDERS: Mapping[type, Callable[[Any, Any], None]] = {
    argparse.Namespace: _set_attributes,
    dict: _ignore_attributes,
    _NumpyType: _NumpyType.build,
}
