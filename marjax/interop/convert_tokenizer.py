"""PyTorch checkpoints of autoencoders as marjax tokenizers: the reference's kl16.ckpt, and those of LDM."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from marjax.errors import UserError
from marjax.interop import weights_file
from marjax.interop.pytorch import Tensor
from marjax.interop.reference import tokenizer_name
from marjax.tokenizers import autoencoder_file
from marjax.tokenizers.autoencoder_names import from_state_dict, to_state_dict
from marjax.tokenizers.spec import AUTOENCODERS, Spec


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


def convert_tokenizer(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> tuple[Autoencoder, bool]:
    """Writes the tokenizer's file of an autoencoder's checkpoint; False if that very file is there already.

    Raises:
      UserError: it cannot be read, is no autoencoder, or `out` is something else. Nothing is written then.
    """
    if not os.fspath(out).endswith(".safetensors"):
        raise UserError(f"--out {out}: a tokenizer alone is a file, so give a name that ends in .safetensors (or a "
                        f"--checkpoint too, for a work directory)")
    autoencoder = read_autoencoder(source)
    if os.path.exists(out):
        if not holds(out, autoencoder):
            raise UserError(f"{out} is there already and has other contents: delete it, or give another --out")
        return autoencoder, False
    write_tokenizer(out, autoencoder)
    return autoencoder, True


def read_autoencoder(path: str | os.PathLike[str]) -> Autoencoder:
    """The autoencoder of a checkpoint: of the reference (`model`), LDM (`state_dict`), a bare state dict, or our own.

    Entries of losses and discriminators are left out by name.

    Raises:
      UserError: it cannot be read, or has other tensors than such an autoencoder; names them.
    """
    file = weights_file.read(path)
    if file.metadata is not None and autoencoder_file.KEY in file.metadata:
        stored = autoencoder_file.read(path)
        return Autoencoder(tokenizer_name(stored.spec), stored.spec, stored.params, stored.scale)
    tensors = file.content
    for key in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
            break
    if not isinstance(tensors, dict) or not all(
            isinstance(each, Tensor) and isinstance(name, str) for name, each in tensors.items()):
        raise UserError(f"{path} has no autoencoder: expected its tensors under 'model' (the reference's kl16.ckpt), "
                        f"under 'state_dict' (LDM), or alone")
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
