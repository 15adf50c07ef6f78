"""Checkpoints of autoencoders as marjax tokenizers: the reference's kl16.ckpt, and those of LDM and diffusers."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from marjax import numerics
from marjax.errors import UserError
from marjax.interop import diffusers, weights_file, wrappers
from marjax.interop.pytorch import Tensor
from marjax.interop.reference import tokenizer_name
from marjax.lock import locked_file
from marjax.paths import takes_paths
from marjax.tokenizers import autoencoder_file
from marjax.tokenizers.autoencoder_names import from_state_dict, to_state_dict
from marjax.tokenizers.spec import AUTOENCODERS, Spec

# Names that every autoencoder of LDM and of diffusers has.
ANCHORS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
_SDXL_SCALE = 0.13025  # of Stable Diffusion XL, whose autoencoder has the shapes of LDM's KL-f8


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An autoencoder on its way to a tokenizer's file.

    Attributes:
      name: under which a config asks for it.
      spec: the network.
      params: its parameter tree, float32 numpy.
      scale: what latents are multiplied with, or None where nothing says it.
    """

    name: str
    spec: Spec
    params: Any
    scale: float | None

    @property
    def checksum(self) -> str:
        """That of the file."""
        return autoencoder_file.checksum(to_state_dict(self.spec, self.params), self.scale)


@numerics.pinned()
@takes_paths("source", "out")
def convert_tokenizer(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, weights: str | None = None
) -> tuple[Autoencoder, bool]:
    """Writes the tokenizer's file of an autoencoder's checkpoint; False if that very file is there already.

    Args:
      source: see `read_autoencoder`.
      out: a file whose name ends in .safetensors.
      weights: see `read_autoencoder`.

    Raises:
      UserError: it cannot be read, is no autoencoder, or `out` is something else. Nothing is written then.
    """
    if not os.fspath(out).endswith(".safetensors"):
        raise UserError(
            f"--out {out}: a tokenizer alone is a file, so give a name that ends in .safetensors (or a "
            f"--checkpoint too, for a work directory)"
        )
    autoencoder = read_autoencoder(source, weights=weights)
    if os.path.exists(out):
        if not holds(out, autoencoder):
            raise UserError(f"{out} is there already and has other contents: delete it, or give another --out")
        return autoencoder, False
    with locked_file(out, "marjax convert"):
        write_tokenizer(out, autoencoder)
    return autoencoder, True


@takes_paths("path")
def read_autoencoder(path: str | os.PathLike[str], *, weights: str | None = None) -> Autoencoder:
    """The autoencoder of a checkpoint: of the reference, LDM, a latent diffusion model, diffusers, or our own file.

    Entries of losses and discriminators are left out by name. The weights may be wrapped or averaged, see `wrappers`.

    Args:
      path: of a PyTorch or safetensors file, of the index of a sharded one, or of its folder. A config.json of
        diffusers beside weights with its names says the scale.
      weights: "ema" or "raw", of a checkpoint with both; EMA by default.

    Raises:
      UserError: it cannot be read, or has other tensors than such an autoencoder; names them.
    """
    if os.path.isdir(os.path.join(path, "vae")):
        path = os.path.join(path, "vae")  # of a pipeline of diffusers
    file = weights_file.read(path)
    if file.metadata is not None and autoencoder_file.KEY in file.metadata:
        stored = autoencoder_file.read(path)
        return Autoencoder(tokenizer_name(stored.spec), stored.spec, stored.params, stored.scale)
    chosen = wrappers.choose(file, ANCHORS, path, weights=weights)
    wrappers.check_size(chosen, file, path)
    scale = None
    tensors = {name: each for name, each in chosen.tensors.items() if each.dtype.kind not in "iub"}  # counters
    if theirs := diffusers.is_theirs(tensors):
        scale = diffusers.scale_of(path)
    try:
        tensors = diffusers.to_ldm(tensors) if theirs else tensors
        spec, params = from_state_dict(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"{path} has weights that are infinite or not a number: it is of no use; get another")
    name = tokenizer_name(spec)
    if not theirs:  # networks of one shape may have other scales, so that of a name is for LDM's names only
        scale = _diffusion_scale(file.content) or AUTOENCODERS[name].scale
    return Autoencoder(name, AUTOENCODERS[name].preset or spec, params, scale)


def _diffusion_scale(content: Any) -> float | None:
    """The scale that the checkpoint of a latent diffusion model says, or None: LDM keeps it where it was measured."""
    for tensors in (content.get("state_dict"), content) if isinstance(content, dict) else ():
        if isinstance(tensors, dict) and any(
            isinstance(name, str) and name.startswith("first_stage_model.") for name in tensors
        ):
            measured = tensors.get("scale_factor")
            if isinstance(measured, Tensor) and measured.shape in ((), (1,)):
                value = float(np.asarray(measured).reshape(()))
                return value if 0.0 < value < np.inf else None
            if any(isinstance(name, str) and name.startswith("conditioner.") for name in tensors):
                return _SDXL_SCALE
    return None


def write_tokenizer(path: str | os.PathLike[str], autoencoder: Autoencoder) -> None:
    """Writes the tokenizer's file. Raises UserError."""
    autoencoder_file.write(path, autoencoder.spec, autoencoder.params, autoencoder.scale)


def holds(path: str | os.PathLike[str], autoencoder: Autoencoder) -> bool:
    """Whether a tokenizer's file holds this autoencoder, to the bit."""
    try:
        stored = autoencoder_file.read(path)
    except (UserError, OSError):
        return False
    return stored.spec == autoencoder.spec and stored.checksum == autoencoder.checksum
