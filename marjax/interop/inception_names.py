"""FID's InceptionV3 under the names and in the layouts of its PyTorch files (torch-fidelity, pytorch-fid).

`kernels` is the shape of every layer's kernel in our network by the name of its PyTorch module: (rows, columns, in,
out) for convolutions, (in, out) for the dense layer.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

_NORM = ("weight", "bias", "running_mean", "running_var")
_BN_EPSILON = 1e-3


def tensor_shapes(kernels: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in the PyTorch files."""
    wanted: dict[str, tuple[int, ...]] = {}
    for module, shape in kernels.items():
        if len(shape) == 2:
            wanted |= {f"{module}.weight": shape[::-1], f"{module}.bias": shape[1:]}
        else:
            rows, columns, before, after = shape
            wanted[f"{module}.conv.weight"] = (after, before, rows, columns)
            wanted |= {f"{module}.bn.{part}": (after,) for part in _NORM}
    return wanted


def to_params(kernels: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray]) -> Any:
    """Our parameters, float32, from a state dict; every BatchNorm is folded into its convolution."""
    flat: dict[str, np.ndarray] = {}
    for module, shape in kernels.items():
        if len(shape) == 2:
            flat |= {f"{module}.kernel": tensors[f"{module}.weight"].T, f"{module}.bias": tensors[f"{module}.bias"]}
            continue
        scale, shift, mean, variance = (tensors[f"{module}.bn.{part}"].astype(np.float64) for part in _NORM)
        scale /= np.sqrt(variance + _BN_EPSILON)
        flat[f"{module}.kernel"] = tensors[f"{module}.conv.weight"].transpose(2, 3, 1, 0) * scale
        flat[f"{module}.bias"] = shift - mean * scale
    return traverse_util.unflatten_dict(
        {path: np.ascontiguousarray(array, np.float32) for path, array in flat.items()}, sep="."
    )
