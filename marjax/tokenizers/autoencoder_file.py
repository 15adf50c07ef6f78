"""The file of an autoencoder: safetensors under LDM's names and in PyTorch's layouts, which other programs read too.

Its metadata has one entry, "marjax": JSON with `kind` ("kl" or "vq"), `spec` (see `spec.Spec`) and `scale` (what
latents are multiplied with; null where nobody knows yet).
"""

import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from marjax.errors import UserError, shortened
from marjax.files import open_regular, write_bytes
from marjax.json_file import check_json, parse_json
from marjax.storage import is_remote
from marjax.tokenizers.autoencoder_names import check, from_state_dict, to_state_dict
from marjax.tokenizers.spec import Spec

KEY = "marjax"
_MAX_HEADER = 1 << 24  # bytes; 100 or so a tensor
_MAX_DIMS = 32


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the file of an autoencoder holds.

    Attributes:
      spec: the network.
      params: its parameter tree, float32 numpy.
      scale: what latents are multiplied with, or None.
      checksum: of the weights and the scale.
    """

    spec: Spec
    params: Any
    scale: float | None
    checksum: str


def write(path: str | os.PathLike[str], spec: Spec, params: Any, scale: float | None) -> str:
    """Writes an autoencoder's file, whole or not at all, into a folder that exists; returns the checksum.

    Raises:
      UserError: it cannot be written.
    """
    tensors = to_state_dict(spec, params)
    meta = {"kind": spec.kind, "spec": spec.to_json(), "scale": scale}
    data = safetensors.save(tensors, {KEY: json.dumps(meta)})
    write_bytes(path, data)
    return checksum(tensors, scale)


def read(path: str | os.PathLike[str]) -> Stored:
    """An autoencoder's file.

    Raises:
      FileNotFoundError: there is none.
      UserError: it is damaged or something else, or its tensors are not those of its network, which are then listed.
    """
    again = "make it again with marjax convert, or give another config.tokenizer.path"
    damaged = f"{path} is no safetensors file or is damaged"
    if epath.Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the .safetensors file of an autoencoder")
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise UserError(f"{damaged} (of {size} bytes, its header would be {length}): {again}")
            header = parse_json(file.read(length), {str: dict}, where=f"the header of {path}", advice=again)
            check_json(header, {"__metadata__?": {str: str}}, where=f"the header of {path}", advice=again)
            metadata = header.pop("__metadata__", {})
            check_json(
                header,
                {str: {"shape": [range(1 << 48)], "data_offsets": [int]}},
                where=f"the header of {path}",
                advice=again,
            )
            ends = [offset for each in header.values() for offset in each["data_offsets"]]
            if 8 + length + max(ends, default=0) != size:
                raise UserError(
                    f"{damaged} (it has {size} bytes, and its header says {8 + length + max(ends, default=0)}): {again}"
                )
            spec, scale = _network(metadata, path, again)
            try:
                # Before the tensors are read, and before a network is made of them.
                check({name: tuple(each["shape"][:_MAX_DIMS]) for name, each in header.items()}, spec)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            file.seek(0)
            tensors = safetensors.load(file.read())
    except MemoryError:
        raise UserError(f"{path} needs more memory than there is: {again}") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError) or is_remote(path):
            raise
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {again}") from None
    except (SafetensorError, KeyError, TypeError) as error:  # also a dtype that NumPy does not have
        raise UserError(f"{damaged} ({_first_line(error)}): {again}") from None
    odd = [f"{shortened(name)} is {array.dtype}" for name, array in tensors.items() if array.dtype != np.float32]
    odd += [f"{name} is not finite" for name, array in tensors.items() if not odd and not np.isfinite(array).all()]
    if odd:
        raise UserError(f"{path} has tensors other than finite float32 ones ({'; '.join(odd[:20])}): {again}")
    try:
        _, params = from_state_dict(tensors, spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Stored(spec, params, scale, checksum(tensors, scale))


def _network(metadata: dict[str, str], path: str | os.PathLike[str], again: str) -> tuple[Spec, float | None]:
    """The network and the scale that the metadata says. Raises UserError."""
    if KEY not in metadata:
        raise UserError(
            f"{path} is a safetensors file, but not one of marjax (its metadata has no {KEY!r}): "
            f"marjax convert makes one of it"
        )
    where = f"{path} does not say what network it holds: its metadata"
    meta = parse_json(metadata[KEY], {"kind": str, "spec": dict, "scale": (float, None)}, where=where, advice=again)
    try:
        spec, scale = Spec.from_json(meta["spec"]), meta["scale"]
        if meta["kind"] != spec.kind or not (scale is None or scale > 0.0):
            raise ValueError(f"kind {shortened(meta['kind'])!r} with {spec.num_codes} codes and scale {scale}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} is wrong ({shortened(_first_line(error), 200)}): {again}") from None
    return spec, None if scale is None else float(scale)


def checksum(tensors: dict[str, np.ndarray], scale: float | None) -> str:
    """SHA-256 over names, shapes and float32 values, and the scale: the latents depend on all of them."""
    digest = hashlib.sha256(f"scale {scale}".encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], "<f4")
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".rstrip(".")
