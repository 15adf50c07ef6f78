"""Writes and opens the latent cache of a config."""

import os

import ml_collections

from marjax import config as config_lib
from marjax import numerics
from marjax.config.resolve import data_config
from marjax.data.latent_cache import write
from marjax.data.latent_cache.read import Manifest
from marjax.errors import UserError
from marjax.paths import takes_paths
from marjax.tokenizers import Cacheable, Tokenizer, open_tokenizer


@numerics.pinned()
@takes_paths("out")
def cache_latents(
    config: ml_collections.ConfigDict,
    out: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    batch_size: int = 32,
    shard_examples: int | None = None,
    overwrite: bool = False,
    measure: bool = False,
    progress: bool = True,
) -> write.Cached:
    """Encodes `config.data` with `config.tokenizer` into a latent cache for `config.data.cache`.

    With `config.data.flip`, every image is also encoded mirrored. `config.data.workers` processes read and crop the
    images. With several JAX processes, all must call this with a shared folder.

    Args:
      config: unresolved or resolved.
      out: a local folder, created if missing; an incomplete cache is resumed.
      dtype: of the moments, "bfloat16" or "float32"; codes are always int32.
      batch_size: images per device, each with its mirror image.
      shard_examples: images per file; by default, at most 64 MiB per file and at least 64 files.
      overwrite: replace an existing cache.
      measure: also time the network alone, before and after.
      progress: show a progress bar.

    Raises:
      UserError: the tokenizer has no network, the data are invalid, or the folder holds another cache or is being
        written by another process.
      TrainingError: a file cannot be written, or moments are not finite.
    """
    config = config_lib.resolve(config)
    tokenizer = open_tokenizer(config_lib.tokenizer_config(config))
    if not isinstance(tokenizer, Cacheable):
        raise UserError(f"config.tokenizer.name={config.tokenizer.name} has no network, so it has no latents to cache")
    return write.write(
        os.fspath(out),
        data_config(config),
        tokenizer,
        compute_dtype=config.tokenizer.autoencoder.dtype,
        dtype=dtype,
        batch_size=batch_size,
        shard_examples=shard_examples,
        overwrite=overwrite,
        measure=measure,
        show=progress,
    )


def open_fitting(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Manifest:
    """The manifest of `config.data.cache`, checked against config and tokenizer. Raises UserError."""
    if not isinstance(tokenizer, Cacheable):
        raise UserError(
            f"config.data.cache={config.data.cache} has no effect: tokenizer {config.tokenizer.name!r} has no network; "
            f"leave it empty"
        )
    return write.open_fitting(data_config(config), tokenizer)
