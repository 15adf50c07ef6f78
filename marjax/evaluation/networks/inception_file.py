"""The weights of FID's InceptionV3: where they are found, and their conversion from PyTorch files.

Our file is safetensors with the names and layouts of the PyTorch files, so other programs read it too. Its metadata has
one entry, "marjax": JSON with `kind` ("inception") and `checksum`.
"""

import hashlib
import json
import os
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save

from marjax import numerics
from marjax.errors import UserError
from marjax.evaluation.networks.inception import Inception, kernel_shapes
from marjax.files import make_folder, write_bytes
from marjax.interop.inception_names import tensor_shapes, to_params
from marjax.interop.state_dict import read_state_dict
from marjax.json_file import parse_json
from marjax.lock import locked_file
from marjax.paths import takes_paths

KEY = "marjax"
KIND = "inception"
VARIABLE = "MARJAX_INCEPTION"
SOURCES = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)


def cache_path() -> str:
    """The default place of the weights: ~/.cache/marjax/inception.safetensors."""
    return os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "marjax", "inception.safetensors"
    )


@numerics.pinned()
def open_inception(path: str | os.PathLike[str] | None = None, *, batch_size: int = 32) -> Inception:
    """Loads the network onto all devices of this process.

    Args:
      path: a file that `convert_inception` wrote, or a PyTorch file; by default the file that the environment variable
        MARJAX_INCEPTION names, or else `cache_path()`.
      batch_size: images per device.

    Raises:
      UserError: the file is missing (the error names where to download it) or has other weights.
    """
    path = path or os.environ.get(VARIABLE) or cache_path()
    if not os.path.exists(path):
        raise UserError(
            f"{os.fspath(path)} does not exist, but the Inception network needs its weights: download {SOURCES[0]} or "
            f"{SOURCES[1]} and run marjax convert --inception FILE, or set {VARIABLE} to their path"
        )
    tensors = read(path)
    return Inception(to_params(kernel_shapes(), tensors), checksum(tensors), batch_size=batch_size)


@takes_paths("source", "out")
def convert_inception(source: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> tuple[str, bool]:
    """Converts a PyTorch file to ours; the write is atomic.

    Args:
      source: weights-inception-2015-12-05-6726825d.pth of torch-fidelity, pt_inception-2015-12-05-6726825d.pth of
        pytorch-fid, or a safetensors file with the same names.
      out: the new file; by default `cache_path()`, whose folder is created.

    Returns:
      The checksum, and False if `out` already had these weights.

    Raises:
      UserError: other weights, or `out` has other contents or cannot be written.
    """
    if out is not None and not os.fspath(out).endswith(".safetensors"):
        raise UserError(f"--out {os.fspath(out)} does not end in .safetensors; the Inception network is one such file")
    tensors = read(source)
    total = checksum(tensors)
    if out is None:
        out = cache_path()
        make_folder(os.path.dirname(out))
    if os.path.exists(out):
        if not _holds(out, total):
            raise UserError(f"{os.fspath(out)} exists with other contents; delete it or give another --out")
        return total, False
    with locked_file(out, "marjax convert"):
        write_bytes(out, save(tensors, {KEY: json.dumps({"kind": KIND, "checksum": total})}))
    return total, True


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the state dict, float32, of a PyTorch file, a safetensors file or one of ours.

    Raises:
      UserError: see `read_state_dict`; or one of our files whose weights do not match its checksum.
    """
    tensors, metadata = _read(path)
    if KEY in metadata and _stored_checksum(metadata) != checksum(tensors):
        raise UserError(
            f"{os.fspath(path)} is damaged: its weights do not match their checksum; "
            f"convert it again with marjax convert --inception FILE"
        )
    return tensors


def checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and float32 values: equal for every file with the same weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], "<f4")
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The state dict and the file's metadata."""
    wanted = tensor_shapes(kernel_shapes())
    return read_state_dict(path, wanted, what="FID's InceptionV3", advice=f"download {SOURCES[0]}")


def _holds(path: str | os.PathLike[str], total: str) -> bool:
    """Whether a file is ours and has weights with this checksum."""
    try:
        tensors, metadata = _read(path)
    except UserError:
        return False
    return KEY in metadata and _stored_checksum(metadata) == checksum(tensors) == total


def _stored_checksum(metadata: Mapping[str, str]) -> str | None:
    try:
        return str(parse_json(metadata[KEY], {"checksum": str}, where=KEY, advice="")["checksum"])
    except UserError:
        return None
