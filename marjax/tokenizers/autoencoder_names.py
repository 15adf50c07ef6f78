"""Which PyTorch tensor of an LDM autoencoder is which parameter here, as one table, read in both directions.

Layouts: a convolution's weight is (out, in, rows, columns) there and (rows, columns, in, out) here; everything else is
the same. `from_state_dict` reads the network itself off names and shapes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from marjax.errors import UserError
from marjax.tokenizers.autoencoder import abstract_params
from marjax.tokenizers.spec import Spec

_MAX_LAYERS = 1000

# What training left in a checkpoint besides the autoencoder.
IGNORED = ("loss.", "discriminator.")


def table(spec: Spec) -> dict[str, str]:
    """PyTorch name -> path of the parameter, keys joined by "/"."""
    names: dict[str, str] = {}

    def conv(theirs: str, ours: str) -> None:
        names.update({f"{theirs}.weight": f"{ours}/kernel", f"{theirs}.bias": f"{ours}/bias"})

    def norm(theirs: str, ours: str) -> None:
        names.update({f"{theirs}.weight": f"{ours}/scale", f"{theirs}.bias": f"{ours}/bias"})

    def block(theirs: str, ours: str, shortcut: bool) -> None:
        for i in (1, 2):
            norm(f"{theirs}.norm{i}", f"{ours}/norm{i}")
            conv(f"{theirs}.conv{i}", f"{ours}/conv{i}")
        if shortcut:
            conv(f"{theirs}.nin_shortcut", f"{ours}/shortcut")

    def attention(theirs: str, ours: str) -> None:
        norm(f"{theirs}.norm", f"{ours}/norm")
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{theirs}.{part}", f"{ours}/{part}")

    mults = spec.channel_mults
    levels = list(range(len(mults)))
    for half, way, order, sample, blocks in (
            ("encoder", "down", levels, "downsample", spec.num_res_blocks),
            ("decoder", "up", levels[::-1], "upsample", spec.num_res_blocks + 1)):
        conv(f"{half}.conv_in", f"{half}/conv_in")
        before = 1 if half == "encoder" else mults[-1]
        for level in order:
            for i in range(blocks):
                block(f"{half}.{way}.{level}.block.{i}", f"{half}/{way}_{level}_block_{i}", mults[level] != before)
                before = mults[level]
                if spec.has_attention(half, level):
                    attention(f"{half}.{way}.{level}.attn.{i}", f"{half}/{way}_{level}_attn_{i}")
            if level != order[-1]:
                conv(f"{half}.{way}.{level}.{sample}.conv", f"{half}/{way}_{level}_{sample}")
        block(f"{half}.mid.block_1", f"{half}/mid_block_1", False)
        attention(f"{half}.mid.attn_1", f"{half}/mid_attn")
        block(f"{half}.mid.block_2", f"{half}/mid_block_2", False)
        norm(f"{half}.norm_out", f"{half}/norm_out")
        conv(f"{half}.conv_out", f"{half}/conv_out")
    conv("quant_conv", "quant_conv")
    conv("post_quant_conv", "post_quant_conv")
    if spec.num_codes:
        names["quantize.embedding.weight"] = "codebook"
    return names


def to_state_dict(spec: Spec, params: Any) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a parameter tree, float32; the inverse of `from_state_dict`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {theirs: _to_pytorch(np.asarray(flat[ours], np.float32)) for theirs, ours in table(spec).items()}


def from_state_dict(state_dict: Mapping[str, Any], spec: Spec | None = None) -> tuple[Spec, Any]:
    """The network and its parameter tree, float32 numpy, from a PyTorch state dict.

    Args:
      state_dict: PyTorch name -> array in PyTorch's layout; names in IGNORED are left out.
      spec: the network, or None to read it off names and shapes. Its nominal resolution cannot be read, so 256 is
        taken, and the places of attention are given in terms of that.

    Raises:
      UserError: a parameter that nothing fills, a tensor that nothing uses, or a shape that does not fit; all of them
        are listed.
    """
    tensors = {name: array for name, array in state_dict.items() if not name.startswith(IGNORED)}
    spec = infer_spec({name: tuple(array.shape) for name, array in tensors.items()}) if spec is None else spec
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract_params(spec), sep="/").items()}
    filled, problems, names = {}, [], table(spec)
    for theirs, ours in names.items():
        if theirs not in tensors:
            problems.append(f"{theirs} is missing")
            continue
        array, expected = tensors[theirs], _pytorch_shape(shapes[ours])
        if tuple(array.shape) != expected:
            problems.append(f"{theirs} has shape {tuple(array.shape)} instead of {expected}")
            continue
        filled[ours] = _to_marjax(np.asarray(array).astype(np.float32))
    problems += [f"{name} is not used" for name in tensors if name not in names]
    if problems:
        raise UserError(f"{len(problems)} tensors do not fit a {spec.kind.upper()} autoencoder of width {spec.width} "
                        f"and channel_mults {spec.channel_mults}: {'; '.join(problems)}")
    return spec, traverse_util.unflatten_dict(filled, sep="/")


def infer_spec(shapes: Mapping[str, tuple[int, ...]]) -> Spec:
    """The network that a state dict with tensors of these shapes belongs to.

    Raises:
      UserError: it is no autoencoder of this kind.
    """
    def shape(name: str) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != 4:
            what = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise UserError(f"this is no LDM autoencoder: {name} {what} (there are {len(shapes)} tensors, such as "
                            f"{', '.join(sorted(shapes)[:3]) or 'none'}): give the file of a KL or VQ first stage")
        return shapes[name]

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in shapes)
        return count_layers([match[1] for match in found if match])

    def attention(half: str, way: str) -> tuple[int, ...]:
        return tuple(256 // 2**i for i in range(levels) if f"{half}.{way}.{i}.attn.0.norm.weight" in shapes)

    levels = count(r"encoder\.down\.(\d+)\.")
    width, in_channels = shape("encoder.conv_in.weight")[:2]
    features = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    latent_channels, embed_dim = shape("post_quant_conv.weight")[:2]
    codes = shapes.get("quantize.embedding.weight", (0,))
    if not width or any(each % width for each in features):
        raise UserError(f"this is no LDM autoencoder: its levels have {features} channels, which are no multiples of "
                        f"the first layer's {width}")
    try:
        return Spec(in_channels, width, tuple(each // width for each in features),
                    count(r"encoder\.down\.0\.block\.(\d+)\."), latent_channels, embed_dim,
                    attention("encoder", "down"), attention("decoder", "up"), 256, codes[0])
    except ValueError as error:
        raise UserError(f"this is no LDM autoencoder: {error}") from None


def count_layers(numbers: Sequence[str]) -> int:
    """How many layers there are, by the numbers in names of tensors. Raises UserError: more than any network has."""
    for number in numbers:
        if len(number) > len(str(_MAX_LAYERS)) or int(number) >= _MAX_LAYERS:
            raise UserError(f"it names a layer {number[:20]}, and no such network has {_MAX_LAYERS}: it is damaged, or "
                            f"of another kind")
    return 1 + max(map(int, numbers), default=-1)


def _to_marjax(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array


def _to_pytorch(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array


def _pytorch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else tuple(shape)
