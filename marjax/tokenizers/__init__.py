"""Tokenizers: images to latents and back."""

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

from marjax import registry
from marjax.errors import UserError, shortened
from marjax.tokenizers.config import TokenizerConfig
from marjax.tokenizers.pixels import Pixels
from marjax.tokenizers.protocol import Cacheable, Tokenizer, TokenShape, check_checksum, missing_file
from marjax.tokenizers.spec import AUTOENCODERS, DEFAULT_NUM_CODES, Spec, spec_of

if TYPE_CHECKING:
    from marjax.tokenizers.autoencoder_file import Stored

__all__ = [
    "Cacheable",
    "TokenShape",
    "Tokenizer",
    "TokenizerConfig",
    "described_tokenizer",
    "make_tokenizer",
    "open_tokenizer",
    "token_shape",
    "tokens_of",
]

# Tokenizers without a network, with stride 1 and the image's channels: whether tokens are codes.
_PATCHES = {"pixels": False, "codebook": True}


def token_shape(
    name: str, *, image_size: int, channels: int, patch_size: int, num_codes: int = 0, spec: Spec | None = None
) -> TokenShape:
    """The tokens of a square image with a side of `image_size` pixels, without opening the tokenizer's weights.

    `patch_size` is the side of a token in latents; `num_codes` is used by tokenizer "codebook"; an autoencoder's `spec`
    is by default the name's preset.

    Raises:
      UserError: an unknown tokenizer, an indivisible image size, or a discrete tokenizer without codes.
    """
    if name in _PATCHES:
        stride, discrete = 1, _PATCHES[name]
    elif name in AUTOENCODERS:
        spec, discrete = spec or AUTOENCODERS[name].preset or Spec(), AUTOENCODERS[name].discrete
        stride, channels, num_codes = spec.stride, spec.embed_dim, spec.num_codes
        if discrete and patch_size != 1:
            raise UserError(
                f"config.tokenizer.patch_size is {patch_size}, but a token of {name} is one code; set it to 1"
            )
    elif (found := registry.find("tokenizer", name)) is not None:
        stride, discrete = found.stride, getattr(found, "discrete", False)
        channels = found.latent_channels(channels) if hasattr(found, "latent_channels") else channels
    else:
        known = sorted([*_PATCHES, *AUTOENCODERS, *registry.names("tokenizer")])
        raise UserError(f"tokenizer.name is {shortened(name)!r}; {registry.unknown('tokenizer', name, known)}")
    if discrete and num_codes < 1:
        raise UserError(f"tokenizer.num_codes is {num_codes}; use at least 1")
    try:
        return TokenShape.of_images(image_size, stride, channels, patch_size, num_codes * discrete)
    except ValueError as error:
        raise UserError(f"data.image_size: {error}") from None


def tokens_of(tokenizer: TokenizerConfig, image_size: int, channels: int) -> TokenShape:
    """The tokens of a square image. Raises UserError as `token_shape` and `spec_of` do."""
    return token_shape(
        tokenizer.name,
        image_size=image_size,
        channels=channels,
        patch_size=tokenizer.patch_size,
        num_codes=DEFAULT_NUM_CODES if tokenizer.num_codes is None else tokenizer.num_codes,
        spec=spec_of(tokenizer, channels) if tokenizer.name in AUTOENCODERS else None,
    )


def open_tokenizer(tokenizer: TokenizerConfig) -> Tokenizer:
    """Opens a tokenizer with its weights. Raises UserError if its file is missing, damaged or contradicts it."""
    name, path = tokenizer.name, tokenizer.path
    if name == "pixels":
        return Pixels(tokenizer.autoencoder.scale or 1.0)
    if name == "codebook":
        from marjax.tokenizers.codebook import open_codebook  # imports JAX, which a config need not

        return open_codebook(tokenizer)
    if name not in AUTOENCODERS:
        return _open_registered(tokenizer)
    from marjax.tokenizers import autoencoder_file  # imports Flax, which a config need not

    wanted = spec_of(tokenizer)
    how = (
        f"marjax convert makes it from {_OFFICIAL.get(name, 'the checkpoint of an LDM autoencoder')} "
        f"(marjax convert --tokenizer FILE --out {shlex.quote(path or 'FILE.safetensors')})"
    )
    if name not in _OFFICIAL:
        how += ", marjax train-tokenizer trains one"
    if not path:
        raise missing_file(name, path, how)
    try:
        stored = autoencoder_file.read(path)
    except FileNotFoundError:
        raise missing_file(name, path, how) from None
    if tokenizer.autoencoder.in_channels is None and AUTOENCODERS[name].preset is None:  # the images decide
        wanted = dataclasses.replace(wanted, in_channels=stored.spec.in_channels)
    if stored.spec.kind != wanted.kind:
        raise UserError(
            f"{path} holds a {stored.spec.kind.upper()} autoencoder, but config.tokenizer.name={name}; give another "
            f"file or another name"
        )
    if differences := stored.spec.differences(wanted):
        raise UserError(
            f"the autoencoder {path} differs from config.tokenizer: it has {'; '.join(differences)}; change "
            f"config.tokenizer.autoencoder (or num_codes), or the path"
        )
    check_checksum(tokenizer.checksum, stored.checksum, "autoencoder", path)
    scale = tokenizer.autoencoder.scale
    return make_tokenizer(
        name,
        stored if scale is None else dataclasses.replace(stored, scale=scale),
        tokenizer.autoencoder.dtype,
        tokenizer.posterior,
    )


def _open_registered(tokenizer: TokenizerConfig) -> Tokenizer:
    """Opens a registered tokenizer. Raises UserError if it breaks the contract or its checksum differs."""
    name = tokenizer.name
    found = registry.find("tokenizer", name)
    if found is None:
        raise UserError(
            f"tokenizer.name is {shortened(name)!r}; {registry.unknown('tokenizer', name, registry.names('tokenizer'))}"
        )
    opened: Tokenizer = found.from_config(tokenizer)
    if missing := [
        each for each in ("params", "checksum", "scale", "encode", "decode", "codebook") if not hasattr(opened, each)
    ]:
        raise UserError(
            f"config.tokenizer.name={name}: {type(opened).__name__} has no {', '.join(missing)}; see docs/extending.md"
        )
    check_checksum(tokenizer.checksum, opened.checksum, f"tokenizer {name!r}", "this")
    return opened


def described_tokenizer(tokenizer: TokenizerConfig, tokens: TokenShape) -> Tokenizer:
    """The tokenizer with ShapeDtypeStructs for `params`, for compiling; an unknown scale is 1."""
    name = tokenizer.name
    if name == "pixels":
        return Pixels(tokenizer.autoencoder.scale or 1.0)
    import jax
    import numpy as np

    if name == "codebook":
        from marjax.tokenizers.codebook import Codebook

        codes = Codebook(np.zeros((tokens.num_codes, tokens.token_dim), np.float32), tokens.patch, tokens.channels)
        codes.params = jax.eval_shape(lambda: codes.params)
        return codes
    if name not in AUTOENCODERS:
        opened = _open_registered(tokenizer)
        opened.params = jax.eval_shape(lambda: opened.params)
        return opened
    from marjax.tokenizers.autoencoder import abstract_params
    from marjax.tokenizers.autoencoder_file import Stored

    spec = spec_of(tokenizer)
    scale = 1.0 if tokenizer.autoencoder.scale is None else tokenizer.autoencoder.scale
    stored = Stored(spec, abstract_params(spec), scale=scale, checksum="")
    return make_tokenizer(name, stored, tokenizer.autoencoder.dtype, tokenizer.posterior)


_OFFICIAL = {
    "kl16": "the reference's kl16.ckpt",
    "kl8": "the checkpoint of LDM's kl-f8",
    "vq16": "the checkpoint of LDM's vq-f16",
    "vq16_continuous": "the checkpoint of LDM's vq-f16",
}


def make_tokenizer(name: str, stored: "Stored", dtype: Any = "float32", posterior: str = "sample") -> Tokenizer:
    """The autoencoder `name` of AUTOENCODERS with the given weights and their scale, by default the name's.

    Raises UserError if the scale is unknown.
    """
    from marjax.tokenizers.kl import KL
    from marjax.tokenizers.vq import VQ

    kind = AUTOENCODERS[name]
    scale = 1.0 if kind.discrete else kind.scale if stored.scale is None else stored.scale
    if scale is None:
        raise UserError(
            f"config.tokenizer.autoencoder.scale of this {name!r} is unknown; measure it with marjax tokenizer check, "
            f"and set it"
        )
    if kind.vq:
        return VQ(
            stored.spec, stored.params, discrete=kind.discrete, scale=scale, dtype=dtype, checksum=stored.checksum
        )
    return KL(stored.spec, stored.params, scale=scale, dtype=dtype, checksum=stored.checksum, posterior=posterior)
