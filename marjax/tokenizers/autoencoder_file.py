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

from marjax.errors import UserError
from marjax.files import write_bytes
from marjax.tokenizers.autoencoder_names import from_state_dict, to_state_dict
from marjax.tokenizers.spec import Spec

KEY = "marjax"


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
    if epath.Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the .safetensors file of an autoencoder")
    data = epath.Path(path).read_bytes()
    try:
        tensors = safetensors.load(data)
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # also a dtype that NumPy does not have
        raise UserError(f"{path} is no safetensors file or is damaged ({_first_line(error)}): {again}") from None
    if KEY not in header.get("__metadata__", {}):
        raise UserError(f"{path} is a safetensors file, but not one of marjax (its metadata has no {KEY!r}): "
                        f"marjax convert makes one of it")
    try:
        meta = json.loads(header["__metadata__"][KEY])
        spec, scale = Spec.from_json(meta["spec"]), meta["scale"]
        if meta["kind"] != spec.kind or not (scale is None or float(scale) > 0.0):
            raise ValueError(f"kind {meta['kind']!r} with {spec.num_codes} codes and scale {scale}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say what network it holds ({_first_line(error)}): {again}") from None
    odd = [f"{name} is {array.dtype}" for name, array in tensors.items() if array.dtype != np.float32]
    odd += [f"{name} is not finite" for name, array in tensors.items() if not odd and not np.isfinite(array).all()]
    if odd:
        raise UserError(f"{path} has tensors other than finite float32 ones ({'; '.join(odd)}): {again}")
    try:
        _, params = from_state_dict(tensors, spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Stored(spec, params, None if scale is None else float(scale), checksum(tensors, scale))


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
