"""Which PyTorch tensor of the reference is which parameter here, as one table, read in both directions.

Layers are stacked here and numbered there ("{i}"). Layouts: a linear weight is (out, in) there and (in..., out...)
here, with heads or modulation parts as axes of their own; embeddings have leading axes of length 1 there.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from marjax.errors import shortened

_LISTED = 20  # problems in an error


@dataclasses.dataclass(frozen=True)
class Linear:
    """A weight; `in_axes` of the parameter's axes are inputs (layers not counted)."""

    in_axes: int = 1

    def to_marjax(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return array.T.reshape(shape)

    def to_pytorch(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.reshape(int(np.prod(array.shape[: self.in_axes])), -1).T)

    def fits(self, pytorch: tuple[int, ...], ours: tuple[int, ...]) -> bool:
        fan_in = int(np.prod(ours[: self.in_axes]))
        return pytorch == (int(np.prod(ours)) // fan_in, fan_in)


@dataclasses.dataclass(frozen=True)
class Array:
    """Anything else, flattened to one axis there (`flat`) or with `leading` axes of length 1 in front."""

    leading: int = 0
    flat: bool = False

    def to_marjax(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return array.reshape(shape)

    def to_pytorch(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(-1) if self.flat else array.reshape((1,) * self.leading + array.shape)

    def fits(self, pytorch: tuple[int, ...], ours: tuple[int, ...]) -> bool:
        return pytorch == ((int(np.prod(ours)),) if self.flat else (1,) * self.leading + ours)


Entry = tuple[str, str, Linear | Array]


def _linear(pytorch: str, ours: str, in_axes: int = 1) -> list[Entry]:
    return [
        (f"{pytorch}.weight", f"{ours}/kernel", Linear(in_axes)),
        (f"{pytorch}.bias", f"{ours}/bias", Array(flat=True)),
    ]


def _norm(pytorch: str, ours: str) -> list[Entry]:
    return [(f"{pytorch}.weight", f"{ours}/scale", Array()), (f"{pytorch}.bias", f"{ours}/bias", Array())]


def _stack(pytorch: str, ours: str) -> list[Entry]:
    return [
        *_norm(f"{pytorch}.norm1", f"{ours}/norm1"),
        *_linear(f"{pytorch}.attn.qkv", f"{ours}/attn/qkv"),
        *_linear(f"{pytorch}.attn.proj", f"{ours}/attn/proj", in_axes=2),
        *_norm(f"{pytorch}.norm2", f"{ours}/norm2"),
        *_linear(f"{pytorch}.mlp.fc1", f"{ours}/mlp/fc1"),
        *_linear(f"{pytorch}.mlp.fc2", f"{ours}/mlp/fc2"),
    ]


_DENOISER, _NET = "head/denoiser", "diffloss.net"
MAR_TABLE: tuple[Entry, ...] = (
    ("class_emb.weight", "class_embedding", Array()),
    ("fake_latent", "null_embedding", Array(leading=1)),
    *_linear("z_proj", "backbone/z_proj"),
    *_norm("z_proj_ln", "backbone/z_proj_norm"),
    ("encoder_pos_embed_learned", "backbone/encoder_pos_embed", Array(leading=1)),
    *_stack("encoder_blocks.{i}", "backbone/encoder/blocks"),
    *_norm("encoder_norm", "backbone/encoder_norm"),
    *_linear("decoder_embed", "backbone/decoder_embed"),
    ("mask_token", "backbone/mask_token", Array(leading=2)),
    ("decoder_pos_embed_learned", "backbone/decoder_pos_embed", Array(leading=1)),
    *_stack("decoder_blocks.{i}", "backbone/decoder/blocks"),
    *_norm("decoder_norm", "backbone/decoder_norm"),
    ("diffusion_pos_embed_learned", "backbone/z_pos_embed", Array(leading=1)),
    *_linear(f"{_NET}.time_embed.mlp.0", f"{_DENOISER}/time_embed/fc1"),
    *_linear(f"{_NET}.time_embed.mlp.2", f"{_DENOISER}/time_embed/fc2"),
    *_linear(f"{_NET}.cond_embed", f"{_DENOISER}/cond_embed"),
    *_linear(f"{_NET}.input_proj", f"{_DENOISER}/input_proj"),
    *_norm(f"{_NET}.res_blocks.{{i}}.in_ln", f"{_DENOISER}/blocks/norm"),
    *_linear(f"{_NET}.res_blocks.{{i}}.mlp.0", f"{_DENOISER}/blocks/fc1"),
    *_linear(f"{_NET}.res_blocks.{{i}}.mlp.2", f"{_DENOISER}/blocks/fc2"),
    *_linear(f"{_NET}.res_blocks.{{i}}.adaLN_modulation.1", f"{_DENOISER}/blocks/modulation"),
    *_linear(f"{_NET}.final_layer.linear", f"{_DENOISER}/final_linear"),
    *_linear(f"{_NET}.final_layer.adaLN_modulation.1", f"{_DENOISER}/final_modulation"),
)


def is_known(name: str, table: tuple[Entry, ...] = MAR_TABLE) -> bool:
    """Whether the table has a PyTorch name."""
    return re.sub(r"\.\d+\.", ".{i}.", name, count=1) in {entry[0] for entry in table} or name in {
        entry[0] for entry in table
    }


def to_marjax(state_dict: Mapping[str, np.ndarray], abstract: Any, table: tuple[Entry, ...] = MAR_TABLE) -> Any:
    """The parameter tree, float32 numpy, from a PyTorch state dict.

    Args:
      state_dict: PyTorch name -> array in PyTorch's layout.
      abstract: nested dict of anything with a shape: the tree to fill.
      table: which name is which.

    Raises:
      ValueError: a parameter that nothing fills, a tensor that nothing uses, or a shape that does not fit; lists them,
        before any tensor is read.
    """
    ours = flatten(abstract)
    sources: dict[str, list[str]] = {}
    problems: list[str] = []
    for pattern, path, kind in table:
        if path not in ours:
            continue
        shape = tuple(ours[path].shape)
        stacked = "{i}" in pattern
        sources[path] = [pattern.format(i=i) for i in range(shape[0])] if stacked else [pattern]
        each = shape[1:] if stacked else shape
        for name in sources[path]:
            if name not in state_dict:
                problems.append(f"{name} is missing")
            elif not kind.fits(tuple(state_dict[name].shape), each):
                problems.append(f"{name} has shape {tuple(state_dict[name].shape)}, which does not fit {path} {each}")
    used = {name for names in sources.values() for name in names}
    problems += [f"{path} is in no table" for path in ours if path not in sources]
    problems += [f"{shortened(name)} is not used" for name in state_dict if name not in used]
    if problems:
        more = f"; and {len(problems) - _LISTED} others" if len(problems) > _LISTED else ""
        raise ValueError(f"{len(problems)} tensors do not match: {'; '.join(problems[:_LISTED])}{more}")
    filled: dict[str, np.ndarray] = {}
    for pattern, path, kind in table:
        if path in ours:
            shape = tuple(ours[path].shape)
            each = shape[1:] if "{i}" in pattern else shape
            layers = [kind.to_marjax(np.asarray(state_dict[name]).astype(np.float32), each) for name in sources[path]]
            filled[path] = np.stack(layers) if "{i}" in pattern else layers[0]
    return unflatten(filled)


def to_pytorch(params: Any, table: tuple[Entry, ...] = MAR_TABLE) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a parameter tree; the inverse of `to_marjax`.

    Raises:
      ValueError: a parameter that the table does not name.
    """
    ours = flatten(params)
    entries = {path: (pattern, kind) for pattern, path, kind in table}
    unknown = [path for path in ours if path not in entries]
    if unknown:
        raise ValueError(f"parameters without a PyTorch name: {', '.join(unknown)}")
    out: dict[str, np.ndarray] = {}
    for path, value in ours.items():
        pattern, kind = entries[path]
        array = np.asarray(value)
        if "{i}" in pattern:
            out.update({pattern.format(i=i): kind.to_pytorch(layer) for i, layer in enumerate(array)})
        else:
            out[pattern] = kind.to_pytorch(array)
    return out


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by "/"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree
