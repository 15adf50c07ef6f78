"""Small configs: digits with every variant and head, and with autoencoders."""

import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from support.paths import DIGITS

from marjax import config as config_lib

# Every variant and every head at least once: what all of them must do is tested with these.
MODELS = [
    ("mar", "diffusion"),
    ("ar", "diffusion"),
    ("random_ar", "categorical"),
    ("mar", "categorical"),
    ("ar", "regression"),
]


# Fields of a model that is traced in half the time of a masked one with a denoiser.
QUICK: dict[str, Any] = {"model__variant": "ar", "model__head": "regression", "sample__num_iter": 16}


# The smallest autoencoder there is (GroupNorm has 32 groups): 8 x 8 digits become 16 tokens of 4 values.
TINY_AUTOENCODER: dict[str, Any] = dict(width=32, channel_mults=(1, 1), num_res_blocks=1, latent_channels=4)


def dotted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{"train__steps": 2} as {"train.steps": 2}, which overrides and overlays are given as."""
    return {key.replace("__", "."): value for key, value in fields.items()}


def flags(fields: Mapping[str, Any]) -> list[str]:
    """The same as arguments of the command line."""
    return [f"--config.{key}={value}" for key, value in dotted(fields).items()]


def make_digits(**overrides: Any) -> ConfigDict:
    """The debug form of the digits config, made smaller still; `train__steps=2` sets train.steps."""
    small = {
        "train.steps": 4,
        "train.warmup_steps": 1,
        "checkpoint.every": 2,
        "log.every": 1,
        "log.samples_every": 0,
        "log.tensorboard": False,
        "log.progress": False,
    }
    return config_lib.apply_overrides(config_lib.load(f"{DIGITS}:debug"), small | dotted(overrides))


def make_model(variant: str, head: str, codebook: str | os.PathLike[str], **overrides: Any) -> ConfigDict:
    """`make_digits` with that variant and head; `codebook` is the file of the fixture of that name."""
    from marjax.variants import HEADS, VARIANTS

    given: dict[str, Any] = {"model__variant": variant, "model__head": head, "train__schedule": HEADS[head].schedule}
    if not VARIANTS[variant].many:
        given["sample__num_iter"] = 16
    if HEADS[head].discrete:
        given |= {"tokenizer__name": "codebook", "tokenizer__path": str(codebook), "tokenizer__num_codes": 16}
    return make_digits(**given | overrides)


def make_autoencoder(name: str, path: str | os.PathLike[str], **overrides: Any) -> ConfigDict:
    """`make_digits` with the tokenizer `name`, "kl", "vq" or "vq_continuous", of TINY_AUTOENCODER in that file."""
    section = {f"tokenizer__autoencoder__{key}": value for key, value in TINY_AUTOENCODER.items()}
    return make_digits(
        **{
            "tokenizer__name": name,
            "tokenizer__patch_size": 1,
            "tokenizer__num_codes": 16,
            "tokenizer__path": str(path),
            **section,
            **overrides,
        }
    )
