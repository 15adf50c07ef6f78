"""The table that maps PyTorch tensors of an LDM autoencoder to parameters, used in both directions.

Layouts: a convolution's weight is (out, in, rows, columns) there and (rows, columns, in, out) here; everything else is
the same. `from_state_dict` infers the network from names and shapes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from marjax.errors import UserError, listed, shortened
from marjax.tokenizers.spec import Spec

_MAX_LAYERS = 1000
_PER_BLOCK = 8  # tensors of a residual block, at least

# What training left in a checkpoint besides the autoencoder.
IGNORED = ("loss.", "discriminator.")


def layout(spec: Spec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """PyTorch name -> (path of the parameter, shape in PyTorch's layout), without tracing the network."""
    names: dict[str, tuple[str, tuple[int, ...]]] = {}

    def conv(theirs: str, ours: str, before: int, after: int, side: int = 3) -> None:
        names.update(
            {
                f"{theirs}.weight": (f"{ours}/kernel", (after, before, side, side)),
                f"{theirs}.bias": (f"{ours}/bias", (after,)),
            }
        )

    def norm(theirs: str, ours: str, features: int) -> None:
        names.update(
            {f"{theirs}.weight": (f"{ours}/scale", (features,)), f"{theirs}.bias": (f"{ours}/bias", (features,))}
        )

    def block(theirs: str, ours: str, before: int, after: int) -> None:
        for i, features in ((1, before), (2, after)):
            norm(f"{theirs}.norm{i}", f"{ours}/norm{i}", features)
            conv(f"{theirs}.conv{i}", f"{ours}/conv{i}", features, after)
        if before != after:
            conv(f"{theirs}.nin_shortcut", f"{ours}/shortcut", before, after, 1)

    def attention(theirs: str, ours: str, features: int) -> None:
        norm(f"{theirs}.norm", f"{ours}/norm", features)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{theirs}.{part}", f"{ours}/{part}", features, features, 1)

    widths = [spec.width * mult for mult in spec.channel_mults]
    levels, halves = list(range(len(widths))), 1 if spec.num_codes else 2
    inside, outside = spec.latent_channels, spec.in_channels
    for half, way, order, blocks, first, before, last in (
        ("encoder", "down", levels, spec.num_res_blocks, outside, spec.width, inside * halves),
        ("decoder", "up", levels[::-1], spec.num_res_blocks + 1, inside, widths[-1], outside),
    ):
        conv(f"{half}.conv_in", f"{half}/conv_in", first, before)
        for level in order:
            for i in range(blocks):
                block(f"{half}.{way}.{level}.block.{i}", f"{half}/{way}_{level}_block_{i}", before, widths[level])
                before = widths[level]
                if spec.has_attention(half, level):
                    attention(f"{half}.{way}.{level}.attn.{i}", f"{half}/{way}_{level}_attn_{i}", before)
            if level != order[-1]:
                conv(f"{half}.{way}.{level}.{way}sample.conv", f"{half}/{way}_{level}_{way}sample", before, before)
        block(f"{half}.mid.block_1", f"{half}/mid_block_1", widths[-1], widths[-1])
        attention(f"{half}.mid.attn_1", f"{half}/mid_attn", widths[-1])
        block(f"{half}.mid.block_2", f"{half}/mid_block_2", widths[-1], widths[-1])
        norm(f"{half}.norm_out", f"{half}/norm_out", before)
        conv(f"{half}.conv_out", f"{half}/conv_out", before, last)
    conv("quant_conv", "quant_conv", spec.latent_channels * halves, spec.embed_dim * halves, 1)
    conv("post_quant_conv", "post_quant_conv", spec.embed_dim, spec.latent_channels, 1)
    if spec.num_codes:
        names["quantize.embedding.weight"] = ("codebook", (spec.num_codes, spec.embed_dim))
    return names


def to_state_dict(spec: Spec, params: Any) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a parameter tree, float32; the inverse of `from_state_dict`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {theirs: _to_pytorch(np.asarray(flat[ours], np.float32)) for theirs, (ours, _) in layout(spec).items()}


def from_state_dict(state_dict: Mapping[str, Any], spec: Spec | None = None) -> tuple[Spec, Any]:
    """The network and its parameter tree, float32 numpy, from a PyTorch state dict.

    Args:
      state_dict: PyTorch name -> array in PyTorch's layout; names in IGNORED are left out.
      spec: the network, or None to read it off names and shapes. Its nominal resolution cannot be read, so 256 is
        taken, and the places of attention are given in terms of that.

    Raises:
      UserError: a parameter that nothing fills, a tensor that nothing uses, or a shape that does not fit; lists them,
        before any tensor is read.
    """
    tensors = {name: array for name, array in state_dict.items() if not name.startswith(IGNORED)}
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
    spec = infer_spec(shapes) if spec is None else spec
    check(shapes, spec)
    filled = {
        ours: _to_marjax(np.asarray(tensors[theirs]).astype(np.float32)) for theirs, (ours, _) in layout(spec).items()
    }
    return spec, traverse_util.unflatten_dict(filled, sep="/")


def check(shapes: Mapping[str, tuple[int, ...]], spec: Spec) -> None:
    """Raises a UserError that lists the tensors, unless those of a network have these shapes.

    Takes no longer than there are tensors, whatever the network.
    """
    blocks = len(spec.channel_mults) * (2 * spec.num_res_blocks + 1)
    if blocks * _PER_BLOCK > len(shapes):
        raise UserError(
            f"{len(shapes)} tensors do not fit a {spec.kind.upper()} autoencoder of {blocks} blocks, expected at least "
            f"{blocks * _PER_BLOCK}; give an undamaged file of this kind"
        )
    names = layout(spec)
    problems = [f"{theirs} is missing" for theirs in names if theirs not in shapes]
    problems += [
        f"{theirs} has shape {shapes[theirs]} instead of {expected}"
        for theirs, (_, expected) in names.items()
        if theirs in shapes and shapes[theirs] != expected
    ]
    problems += [f"{shortened(name)} is not used" for name in shapes if name not in names]
    if problems:
        raise UserError(
            f"{len(problems)} tensors do not fit a {spec.kind.upper()} autoencoder of width {spec.width} "
            f"and channel_mults {spec.channel_mults}: {listed(problems, between='; ')}"
        )


def infer_spec(shapes: Mapping[str, tuple[int, ...]]) -> Spec:
    """Infers the network from a state dict's shapes. Raises UserError if it is not an LDM autoencoder."""

    def shape(name: str) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != 4:
            what = f"has shape {shapes[name]}" if name in shapes else "is missing"
            some = ", ".join(map(shortened, sorted(shapes)[:3])) or "none"
            raise UserError(
                f"not an LDM autoencoder: {name} {what} (there are {len(shapes)} tensors, such as {some}); give the "
                f"file of a KL or VQ first stage"
            )
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
        raise UserError(
            f"not an LDM autoencoder: its levels have {features} channels, expected multiples of {width}, as many as "
            f"the first layer has"
        )
    try:
        return Spec(
            in_channels,
            width,
            tuple(each // width for each in features),
            count(r"encoder\.down\.0\.block\.(\d+)\."),
            latent_channels,
            embed_dim,
            attention("encoder", "down"),
            attention("decoder", "up"),
            256,
            codes[0],
        )
    except ValueError as error:
        raise UserError(f"not an LDM autoencoder: {error}") from None


def count_layers(numbers: Sequence[str]) -> int:
    """The number of layers from the numbers in tensor names. Raises UserError if one is too large."""
    for number in numbers:
        if len(number) > len(str(_MAX_LAYERS)) or int(number) >= _MAX_LAYERS:
            raise UserError(
                f"layer {number[:20]} in a tensor's name is too large, expected less than {_MAX_LAYERS}; give an "
                f"undamaged file"
            )
    return 1 + max(map(int, numbers), default=-1)


def _to_marjax(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array


def _to_pytorch(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array
