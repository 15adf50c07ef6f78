"""The file of an autoencoder: safetensors under LDM's names and in PyTorch's layouts, which other programs read too.

Its metadata has one entry, "marjax": JSON with `kind` ("kl" or "vq"), `spec` (see `spec.Spec`) and `scale`
(multiplies latents; null if unknown).
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
    """The content of an autoencoder's file."""

    spec: Spec
    params: Any  # float32 numpy
    scale: float | None  # multiplies latents; None if unknown
    checksum: str  # of the weights and the scale


def write(path: str | os.PathLike[str], spec: Spec, params: Any, scale: float | None) -> str:
    """Writes an autoencoder's file atomically into an existing folder; returns the checksum. Raises UserError."""
    tensors = to_state_dict(spec, params)
    meta = {"kind": spec.kind, "spec": spec.to_json(), "scale": scale}
    write_bytes(path, safetensors.save(tensors, {KEY: json.dumps(meta)}))
    return checksum(tensors, scale)


def read(path: str | os.PathLike[str]) -> Stored:
    """Reads an autoencoder's file.

    Raises:
      FileNotFoundError: it does not exist.
      UserError: it is not a valid autoencoder file, or has other tensors than its network, which the error lists.
    """
    again = "make it again with marjax convert, or give another config.tokenizer.path"
    damaged, where = f"{path} is not a valid safetensors file", f"the header of {path}"
    if epath.Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the .safetensors file of an autoencoder")
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise UserError(f"{damaged} ({size} bytes with a header of {length}); {again}")
            header = parse_json(file.read(length), {str: dict}, where=where, advice=again)
            check_json(header, {"__metadata__?": {str: str}}, where=where, advice=again)
            metadata = header.pop("__metadata__", {})
            tensor = {"shape": [range(1 << 48)], "data_offsets": [int]}
            check_json(header, {str: tensor}, where=where, advice=again)
            ends = [offset for each in header.values() for offset in each["data_offsets"]]
            if (expected := 8 + length + max(ends, default=0)) != size:
                raise UserError(f"{damaged} ({size} bytes, expected {expected}); {again}")
            spec, scale = _network(metadata, path, again)
            try:
                # Checked before the tensors are read.
                check({name: tuple(each["shape"][:_MAX_DIMS]) for name, each in header.items()}, spec)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            file.seek(0)
            tensors = safetensors.load(file.read())
    except MemoryError:
        raise UserError(f"{path} does not fit into memory; {again}") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError) or is_remote(path):
            raise
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {again}") from None
    except (SafetensorError, KeyError, TypeError) as error:  # also a dtype that NumPy does not have
        raise UserError(f"{damaged} ({_first_line(error)}); {again}") from None
    odd = [f"{shortened(name)} is {array.dtype}" for name, array in tensors.items() if array.dtype != np.float32]
    odd += [f"{name} is not finite" for name, array in tensors.items() if not odd and not np.isfinite(array).all()]
    if odd:
        raise UserError(f"{path} has tensors other than finite float32 ones ({'; '.join(odd[:20])}); {again}")
    try:
        _, params = from_state_dict(tensors, spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Stored(spec, params, scale, checksum(tensors, scale))


def _network(metadata: dict[str, str], path: str | os.PathLike[str], again: str) -> tuple[Spec, float | None]:
    """Parses the network and the scale from the metadata. Raises UserError."""
    if KEY not in metadata:
        raise UserError(f"{path} is a safetensors file without {KEY!r} in its metadata; convert it with marjax convert")
    where = f"the metadata of {path}"
    meta = parse_json(metadata[KEY], {"kind": str, "spec": dict, "scale": (float, None)}, where=where, advice=again)
    try:
        spec, scale = Spec.from_json(meta["spec"]), meta["scale"]
        if meta["kind"] != spec.kind or not (scale is None or scale > 0.0):
            raise ValueError(f"kind {shortened(meta['kind'])!r} with {spec.num_codes} codes and scale {scale}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} is invalid ({shortened(_first_line(error), 200)}); {again}") from None
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
