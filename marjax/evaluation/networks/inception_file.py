"""The weights of FID's InceptionV3: where they are found, and the PyTorch files that they come from.

Our own file is safetensors under the names and in the layouts of the PyTorch files, which other programs read too. Its
metadata has one entry, "marjax": JSON with `kind` ("inception") and `checksum`.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save

from marjax import numerics
from marjax.errors import UserError, shortened
from marjax.evaluation.networks.inception import BN_EPSILON, Inception, abstract_params
from marjax.files import make_folder, write_bytes
from marjax.interop import weights_file, wrappers
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

_NORM = ("weight", "bias", "running_mean", "running_var")
_LISTED = 20  # tensors in an error: all of a few, and not the hundreds of another network


def cache_path() -> str:
    """Where weights are looked for unless something else is said: ~/.cache/marjax/inception.safetensors."""
    return os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "marjax", "inception.safetensors"
    )


@numerics.pinned()
def open_inception(path: str | os.PathLike[str] | None = None, *, batch_size: int = 32) -> Inception:
    """The network with its weights, on all devices of this process.

    Args:
      path: of what `convert_inception` wrote, or of a PyTorch file; by default what the environment variable
        MARJAX_INCEPTION names, or else `cache_path()`.
      batch_size: images on a device at a time.

    Raises:
      UserError: there are no weights, which says where to get them, or they are others.
    """
    path = path or os.environ.get(VARIABLE) or cache_path()
    if not os.path.exists(path):
        raise UserError(
            f"{os.fspath(path)} does not exist, but the Inception network needs its weights: download "
            f"{SOURCES[0]} or {SOURCES[1]} and run marjax convert --inception FILE, or say where they are "
            f"by {VARIABLE}"
        )
    tensors = read(path)
    return Inception(to_params(tensors), checksum(tensors), batch_size=batch_size)


@takes_paths("source", "out")
def convert_inception(source: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> tuple[str, bool]:
    """Writes the weights of a PyTorch file as a file of ours, whole or not at all.

    Args:
      source: weights-inception-2015-12-05-6726825d.pth of torch-fidelity, pt_inception-2015-12-05-6726825d.pth of
        pytorch-fid, or a safetensors file with the same names.
      out: where to; by default `cache_path()`, whose folder is made.

    Returns:
      The checksum, and False if a file with these very weights is there already.

    Raises:
      UserError: other weights, or `out` is something else or cannot be written.
    """
    if out is not None and not os.fspath(out).endswith(".safetensors"):
        raise UserError(
            f"--out {os.fspath(out)}: the Inception network is a file, so give a name that ends in .safetensors"
        )
    tensors = read(source)
    total = checksum(tensors)
    if out is None:
        out = cache_path()
        make_folder(os.path.dirname(out))
    if os.path.exists(out):
        if not _holds(out, total):
            raise UserError(
                f"{os.fspath(out)} is there already and has other contents: delete it, or give another --out"
            )
        return total, False
    with locked_file(out, "marjax convert"):
        write_bytes(out, save(tensors, {KEY: json.dumps({"kind": KIND, "checksum": total})}))
    return total, True


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The state dict in a PyTorch file, a safetensors file or one of ours, float32.

    Raises:
      UserError: it cannot be read, is damaged, or has tensors missing, unused, of other shapes or not finite, which
        are listed.
    """
    file = weights_file.read(path)
    wanted = shapes()
    given = wrappers.choose(file, list(wanted)[:2], path, what="FID's InceptionV3").tensors
    odd = [f"{name} is missing" for name in wanted if name not in given]
    odd += [f"{shortened(name)} is not used" for name in given if name not in wanted]
    odd += [
        f"{name} has shape {given[name].shape} instead of {shape}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    if not odd:
        tensors = {name: np.ascontiguousarray(np.asarray(given[name]), np.float32) for name in wanted}
        odd = [
            f"{name} has values that are infinite or not a number"
            for name, array in tensors.items()
            if not np.isfinite(array).all()
        ]
    if odd:
        more = f"; and {len(odd) - _LISTED} others" if len(odd) > _LISTED else ""
        raise UserError(
            f"{os.fspath(path)} is not FID's InceptionV3: {'; '.join(odd[:_LISTED])}{more}; get {SOURCES[0]}"
        )
    if KEY in (file.metadata or {}) and _claimed(file.metadata) != checksum(tensors):
        raise UserError(
            f"{os.fspath(path)} is damaged (its weights do not have the checksum that it names): make it "
            f"again with marjax convert --inception FILE"
        )
    return tensors


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the PyTorch files, with their shapes there."""
    wanted: dict[str, tuple[int, ...]] = {}
    for module, shape in _kernels().items():
        if len(shape) == 2:
            wanted |= {f"{module}.weight": shape[::-1], f"{module}.bias": shape[1:]}
        else:
            rows, columns, before, after = shape
            wanted[f"{module}.conv.weight"] = (after, before, rows, columns)
            wanted |= {f"{module}.bn.{part}": (after,) for part in _NORM}
    return wanted


def to_params(tensors: Mapping[str, np.ndarray]) -> Any:
    """The parameters of `inception.Network`, float32, of a state dict; every BatchNorm goes into its convolution."""
    flat: dict[str, np.ndarray] = {}
    for module, shape in _kernels().items():
        if len(shape) == 2:
            flat |= {f"{module}.kernel": tensors[f"{module}.weight"].T, f"{module}.bias": tensors[f"{module}.bias"]}
            continue
        scale, shift, mean, variance = (tensors[f"{module}.bn.{part}"].astype(np.float64) for part in _NORM)
        scale /= np.sqrt(variance + BN_EPSILON)
        flat[f"{module}.kernel"] = tensors[f"{module}.conv.weight"].transpose(2, 3, 1, 0) * scale
        flat[f"{module}.bias"] = shift - mean * scale
    return traverse_util.unflatten_dict(
        {path: np.ascontiguousarray(array, np.float32) for path, array in flat.items()}, sep="."
    )


def checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and float32 values: the same for every file with the same weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], "<f4")
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


@functools.cache
def _kernels() -> dict[str, tuple[int, ...]]:
    """The network's layers and the shapes of their kernels."""
    flat = traverse_util.flatten_dict(abstract_params(), sep=".")
    return {path.removesuffix(".kernel"): leaf.shape for path, leaf in flat.items() if path.endswith(".kernel")}


def _holds(path: str | os.PathLike[str], total: str) -> bool:
    """Whether a file of ours has weights of this checksum."""
    try:
        return KEY in (weights_file.read(path).metadata or {}) and checksum(read(path)) == total
    except UserError:
        return False


def _claimed(metadata: dict[str, str] | None) -> str | None:
    """The checksum that the metadata of a file of ours names."""
    try:
        text = (metadata or {}).get(KEY, "")
        return str(parse_json(text, {"checksum": str}, where=KEY, advice="")["checksum"])
    except UserError:
        return None
