"""PyTorch checkpoints of autoencoders as marjax tokenizers: the reference's kl16.ckpt, and those of LDM."""

import dataclasses
import os
import re
from typing import Any

import jax
import numpy as np

from marjax import numerics
from marjax.errors import UserError
from marjax.interop import weights_file, wrappers
from marjax.interop.reference import tokenizer_name
from marjax.lock import locked_file
from marjax.tokenizers import autoencoder_file
from marjax.tokenizers.autoencoder_names import from_state_dict, to_state_dict
from marjax.tokenizers.spec import AUTOENCODERS, Spec

# Names that every autoencoder of LDM has, and most of diffusers.
ANCHORS = ("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight")
_DIFFUSERS = re.compile(r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block)\.")


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
def convert_tokenizer(source: str | os.PathLike[str], out: str | os.PathLike[str], *,
                      weights: str | None = None) -> tuple[Autoencoder, bool]:
    """Writes the tokenizer's file of an autoencoder's checkpoint; False if that very file is there already.

    Args:
      source: see `read_autoencoder`.
      out: a file whose name ends in .safetensors.
      weights: see `read_autoencoder`.

    Raises:
      UserError: it cannot be read, is no autoencoder, or `out` is something else. Nothing is written then.
    """
    if not os.fspath(out).endswith(".safetensors"):
        raise UserError(f"--out {out}: a tokenizer alone is a file, so give a name that ends in .safetensors (or a "
                        f"--checkpoint too, for a work directory)")
    autoencoder = read_autoencoder(source, weights=weights)
    if os.path.exists(out):
        if not holds(out, autoencoder):
            raise UserError(f"{out} is there already and has other contents: delete it, or give another --out")
        return autoencoder, False
    with locked_file(out, "marjax convert"):
        write_tokenizer(out, autoencoder)
    return autoencoder, True


def read_autoencoder(path: str | os.PathLike[str], *, weights: str | None = None) -> Autoencoder:
    """The autoencoder of a checkpoint: of the reference, of LDM, inside a latent diffusion model, or our own file.

    Entries of losses and discriminators are left out by name. The weights may be wrapped or averaged, see `wrappers`.

    Args:
      path: of a PyTorch or safetensors file, of the index of a sharded one, or of its folder.
      weights: "ema" or "raw", of a checkpoint with both; EMA by default.

    Raises:
      UserError: it cannot be read, or has other tensors than such an autoencoder; names them.
    """
    file = weights_file.read(path)
    if file.metadata is not None and autoencoder_file.KEY in file.metadata:
        stored = autoencoder_file.read(path)
        return Autoencoder(tokenizer_name(stored.spec), stored.spec, stored.params, stored.scale)
    chosen = wrappers.choose(file, ANCHORS, path, weights=weights)
    wrappers.check_size(chosen, file, path)
    tensors = chosen.tensors
    if any(_DIFFUSERS.match(name) for name in tensors):
        raise UserError(f"{path} has the names of diffusers, which cannot be read yet: give the file of the same "
                        f"autoencoder under LDM's names (encoder.down.0.block.0.conv1.weight), or a checkpoint of a "
                        f"latent diffusion model that holds it (first_stage_model.)")
    try:
        spec, params = from_state_dict(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"{path} has weights that are infinite or not a number: it is of no use; get another")
    name = tokenizer_name(spec)
    return Autoencoder(name, AUTOENCODERS[name].preset or spec, params, AUTOENCODERS[name].scale)


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
