"""AutoencoderKL in the format of diffusers: renames its tensors to LDM's and reads its config.json.

Names and defaults: diffusers, models/autoencoders/autoencoder_kl.py; attention had other names before version 0.18.
"""

import functools
import os
import re
from collections.abc import Mapping

from marjax.errors import UserError, shortened
from marjax.interop.pytorch import Tensor
from marjax.json_file import read_json
from marjax.tokenizers.autoencoder_names import count_layers
from marjax.tokenizers.spec import GROUPS

_SCALE = 0.18215  # the default of diffusers
_THEIRS = re.compile(r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block)\.")
_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "conv_norm_out": "norm_out",
}
_BLOCKS = (
    (re.compile(r"^(encoder)\.down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\."), "down"),
    (re.compile(r"^(decoder)\.up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\."), "up"),
)
_MIDDLE = re.compile(r"^(encoder|decoder)\.mid_block\.(resnets|attentions)\.([01])\.")
# Supported values, default first; other values are refused.
_ONLY = {
    "act_fn": ("silu",),
    "norm_num_groups": (GROUPS,),
    "shift_factor": (None, 0),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}


def is_theirs(names: Mapping[str, object]) -> bool:
    """Whether an autoencoder's tensors have diffusers' names."""
    return any(map(_THEIRS.match, names))


def to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors to LDM's names; linear layers of attention become 1 x 1 convolutions.

    Raises:
      UserError: a layer number is out of range, or two tensors get the same name.
    """
    levels = count_layers([match[2] for match in map(_BLOCKS[1][0].match, tensors) if match])

    def level(way: str, match: re.Match[str]) -> str:
        number = int(match[2][:4]) if way == "down" else levels - 1 - int(match[2])
        kind = {
            "resnets": f"block.{match[4]}.",
            "attentions": f"attn.{match[4]}.",
            "downsamplers": "downsample.",
            "upsamplers": "upsample.",
        }[match[3]]
        return f"{match[1]}.{way}.{number}.{kind}"

    def middle(match: re.Match[str]) -> str:
        return f"{match[1]}.mid.{'block' if match[2] == 'resnets' else 'attn'}_{int(match[3]) + 1}."

    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = name
        for pattern, way in _BLOCKS:
            ours = pattern.sub(functools.partial(level, way), ours)
        ours = _MIDDLE.sub(middle, ours).replace(".to_out.0.", ".proj_out.")
        ours = ".".join(_PARTS.get(part, part) for part in ours.split("."))
        if ".attn" in ours and len(tensor.shape) == 2:
            tensor = _convolution(tensor)
        if ours in renamed:
            raise UserError(f"two of its tensors are {shortened(ours)}: it mixes old and new names")
        renamed[ours] = tensor
    return renamed


def scale_of(path: str | os.PathLike[str]) -> float | None:
    """Returns the latent scale in the config.json beside the weights; None without that file.

    Args:
      path: the file, the index or the folder.

    Raises:
      UserError: the config is of another network, or has unsupported values.
    """
    path = os.fspath(path)
    file = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    config = read_json(
        file,
        {"_class_name?": str, "scaling_factor?": float},
        missing=None,
        advice="get it again, or move the weights elsewhere to convert them without it",
    )
    if config is None:
        return None
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError(
            f"{file} is of a {shortened(config['_class_name'])}, which this program cannot run: give an AutoencoderKL"
        )
    for name, allowed in _ONLY.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{file} has {name} {shortened(str(config[name]))}, but this program computes only "
                f"{allowed[0]}: give an autoencoder of the kind that Stable Diffusion 1, 2 or XL has"
            )
    return config.get("scaling_factor", _SCALE)


def _convolution(tensor: Tensor) -> Tensor:
    shape = (*tensor.shape, 1, 1)
    return Tensor(shape, tensor.dtype, lambda: tensor.read().reshape(shape))
