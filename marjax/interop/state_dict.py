"""PyTorch state dicts of fixed networks, which must have exactly the tensors that we expect."""

import os
import re
from collections.abc import Mapping

import numpy as np

from marjax.errors import UserError, listed, shortened
from marjax.interop import weights_file, wrappers


def read_state_dict(
    path: str | os.PathLike[str], wanted: Mapping[str, tuple[int, ...]], *, what: str, advice: str, ignored: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a PyTorch or safetensors file.

    Args:
      path: the file.
      wanted: the shape of every tensor, by name.
      what: the network, for errors.
      advice: the end of an error about wrong tensors.
      ignored: a regular expression of names to skip.

    Returns:
      The tensors as float32, in the order of `wanted`, and the file's metadata.

    Raises:
      UserError: the file cannot be read, or has tensors missing, unused, of other shapes or not finite; it lists them.
    """
    file = weights_file.read(path)
    given = wrappers.choose(file, list(wanted)[:2], path, what=what).tensors
    odd = [f"{name} is missing" for name in wanted if name not in given]
    odd += [
        f"{shortened(name)} is not used" for name in given if name not in wanted and not re.fullmatch(ignored, name)
    ]
    odd += [
        f"{name} has shape {given[name].shape} instead of {shape}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    tensors: dict[str, np.ndarray] = {}
    if not odd:
        tensors = {name: np.ascontiguousarray(np.asarray(given[name]), np.float32) for name in wanted}
        odd = [f"{name} is not finite" for name, array in tensors.items() if not np.isfinite(array).all()]
    if odd:
        raise UserError(f"{os.fspath(path)} is not {what}: {listed(odd, between='; ')}; {advice}")
    return tensors, file.metadata or {}
