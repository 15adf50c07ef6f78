"""Writes PyTorch files without PyTorch, hostile ones too: its own pickler would not write those."""

import dataclasses
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    function: Any
    arguments: Any
    opcode: bytes = b"R"


@dataclasses.dataclass(frozen=True)
class Build:
    target: Any
    state: Any


@dataclasses.dataclass(frozen=True)
class Pid:
    pid: Any


@dataclasses.dataclass(frozen=True)
class Raw:
    opcodes: bytes


def opcodes(value: Any) -> bytes:
    match value:
        case Raw():
            return value.opcodes
        case Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return opcodes(value.function) + opcodes(value.arguments) + value.opcode
        case Build():
            return opcodes(value.target) + opcodes(value.state) + b"b"
        case Pid():
            return opcodes(value.pid) + b"Q"
        case dict():
            return b"}(" + b"".join(opcodes(k) + opcodes(v) for k, v in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case _:
            return pickle.dumps(value, 2)[2:-1]


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def storage(kind: str, key: str, numel: int, *view: Any, module: str = "torch") -> Pid:
    return Pid(("storage", Global(module, kind), key, "cpu", numel, *view))


def tensor(
    place: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], version: int = 2, *more: Any
) -> Call:
    arguments: tuple[Any, ...] = {
        1: (),
        2: (False, Call(Global("collections", "OrderedDict"), ())),
        3: (False, Call(Global("collections", "OrderedDict"), ())),
    }[version]
    name = "_rebuild_tensor" if version == 1 else f"_rebuild_tensor_v{version}"
    return Call(Global("torch._utils", name), (place, offset, shape, strides, *arguments, *more))


def write_zip(
    path: pathlib.Path,
    value: Any,
    storages: Iterable[bytes] = (),
    *,
    folder: str = "archive",
    order: bytes = b"little",
    method: int = zipfile.ZIP_STORED,
    extra: Iterable[tuple[str, bytes]] = (),
) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{folder}/data.pkl", value if isinstance(value, bytes) else pickled(value))
        if order:
            archive.writestr(f"{folder}/byteorder", order)
        for i, data in enumerate(storages):
            archive.writestr(f"{folder}/data/{i}", data)
        for name, data in extra:
            archive.writestr(name, data)
    return path


def write_legacy(
    path: pathlib.Path, value: Any, storages: Sequence[np.ndarray], *, little: bool = True, keys: Any = None
) -> pathlib.Path:
    parts = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": little, "type_sizes": {}}]
    data = b"".join(map(pickled, parts)) + pickled(value)
    data += pickled([str(i) for i in range(len(storages))] if keys is None else keys)
    for array in storages:
        order: Literal["<", ">"] = "<" if little else ">"
        data += struct.pack(f"{order}q", array.size) + array.astype(array.dtype.newbyteorder(order)).tobytes()
    path.write_bytes(data)
    return path
