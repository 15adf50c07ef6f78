"""Patches of pixels as codes: the discrete tokenizer of small images, and its file.

Shapes: B batch, H x W image of C channels, p patch side, K codes of D = p * p * C values.
"""

import dataclasses
import hashlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from marjax.errors import UserError
from marjax.npz_file import read_npz
from marjax.tokenizers.config import TokenizerConfig
from marjax.tokenizers.nearest_code import nearest
from marjax.tokenizers.protocol import TokenShape, check_checksum, missing_file

_ARRAYS = {"codes": ("f", 2), "source": ("U", 0), "mse": ("f", 0), "psnr": ("f", 0)} | dict.fromkeys(
    ("patch_size", "channels", "num_images", "seed"), ("i", 0)
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How the codes were fitted, and their reconstruction error."""

    mse: float  # of reconstructed images in [-1, 1]
    psnr: float  # in dB for a peak-to-peak value of 2; infinite without any error
    num_images: int  # that `mse` was measured on
    seed: int
    source: str  # the data of these images


class Codebook:
    """Latents are pixels, stride 1, with every p x p patch replaced by the nearest of K codes.

    `TokenShape.patchify(encode(...))` returns rows of the codebook, to the bit. `params` is {"codebook": float32
    (K, D)}, each code ordered (channel, row, column) as a token is.
    """

    def __init__(self, codes: np.ndarray, patch_size: int, channels: int) -> None:
        """Raises ValueError: `codes` is not float32 (K, D) with D = patch_size**2 * channels, or is not finite."""
        dim = patch_size**2 * channels
        if codes.dtype != np.float32 or codes.ndim != 2 or codes.shape[1] != dim or not len(codes):
            raise ValueError(f"codes are {codes.dtype} {codes.shape}, expected float32 (at least 1, {dim})")
        if not np.isfinite(codes).all():
            raise ValueError("codes are not finite")
        self.patch_size, self.channels, self.num_codes = patch_size, channels, len(codes)
        self.params: Any = {"codebook": codes}
        self.scale = 1.0
        self.checksum = hashlib.sha256(f"{codes.shape}".encode() + codes.astype("<f4").tobytes()).hexdigest()

    def encode(self, params: Any, image: jax.Array, key: jax.Array) -> jax.Array:
        """The image, float (B, H, W, C) in [-1, 1], with its patches replaced by codes: float32 (B, H, W, C).

        Raises:
          UserError: another number of channels, or sides that p does not divide.
        """
        _, height, width, channels = image.shape
        if channels != self.channels or height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"images are {height} x {width} with {channels} channels, but the codebook has {self.patch_size} x "
                f"{self.patch_size} patches with {self.channels}; change config.data, or run marjax train-tokenizer"
            )
        shape = TokenShape(
            height // self.patch_size, width // self.patch_size, channels, self.patch_size, self.num_codes
        )
        codebook = self.codebook(params)
        return shape.unpatchify(codebook[nearest(shape.patchify(image), codebook)])

    def decode(self, params: Any, latent: jax.Array) -> jax.Array:
        """The latent itself, (B, H, W, C)."""
        return latent

    def codebook(self, params: Any) -> jax.Array:
        """The codes, float32 (K, D)."""
        return jnp.asarray(params["codebook"])


def arrays_of(codebook: Codebook, fit: Fit) -> dict[str, np.ndarray]:
    """The arrays of a codebook's .npz file."""
    sizes = {"patch_size": codebook.patch_size, "channels": codebook.channels}
    return {
        "codes": codebook.params["codebook"],
        **{name: np.array(value) for name, value in (sizes | dataclasses.asdict(fit)).items()},
    }


def read(path: str | os.PathLike[str]) -> tuple[Codebook, Fit]:
    """A codebook's file, as `arrays_of` describes it.

    Raises:
      FileNotFoundError: there is none.
      UserError: it cannot be read, or is something else.
    """
    advice = "make it again with marjax train-tokenizer --overwrite, or give another config.tokenizer.path"
    if not epath.Path(path).exists():
        raise FileNotFoundError(path)
    arrays = read_npz(path, _ARRAYS, advice=advice)
    try:
        codebook = Codebook(arrays["codes"], int(arrays["patch_size"]), int(arrays["channels"]))
    except ValueError as error:
        raise UserError(f"{path} is not a valid codebook ({error}); {advice}") from None
    kinds = {"mse": float, "psnr": float, "num_images": int, "seed": int, "source": str}
    return codebook, Fit(**{name: kind(arrays[name]) for name, kind in kinds.items()})


def open_codebook(tokenizer: TokenizerConfig) -> Codebook:
    """Opens the codebook at `path`. Raises UserError if it is missing, damaged or contradicts the config."""
    how = "make one with marjax train-tokenizer --config NAME"
    if not tokenizer.path:
        raise missing_file("codebook", "", f"{how} --out FILE.npz")
    try:
        codebook, _ = read(tokenizer.path)
    except FileNotFoundError:
        raise missing_file("codebook", tokenizer.path, how) from None
    for key, given in (("num_codes", codebook.num_codes), ("patch_size", codebook.patch_size)):
        if given != (wanted := getattr(tokenizer, key)):
            raise UserError(
                f"config.tokenizer.{key} is {wanted}, but the codebook {tokenizer.path} was made "
                f"with {given}; set it to {given}, or {how}"
            )
    check_checksum(tokenizer.checksum, codebook.checksum, "codebook", tokenizer.path)
    return codebook
