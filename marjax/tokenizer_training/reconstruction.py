"""The reconstruction error of a tokenizer, and statistics of its latents.

Legend: N images of S x S pixels and C channels.
"""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from marjax import config as config_lib
from marjax import numerics, progress
from marjax.data.config import DataConfig
from marjax.data.folder import pictures, read_picture
from marjax.data.pipeline import Batches
from marjax.data.preprocess import Preprocess
from marjax.errors import UserError
from marjax.files import make_folder
from marjax.images import beside, grid, to_uint8, write_png
from marjax.paths import takes_paths
from marjax.ranges import check_arguments
from marjax.tokenizers import Tokenizer, make_tokenizer, open_tokenizer
from marjax.tokenizers import spec as autoencoder_spec
from marjax.tokenizers.nearest_code import nearest

PICTURE = "reconstructions.png"
_SHOWN = 32  # images in the picture


@numerics.pinned()
@takes_paths("images", "path", "out")
def check(
    images: str | os.PathLike[str] | None = None,
    config: ml_collections.ConfigDict | None = None,
    *,
    name: str = "",
    path: str = "",
    image_size: int | None = None,
    num_images: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Encodes and decodes images, cropped as in training, without flips, and measures the reconstructions.

    Args:
      images: a folder of pictures, at any depth, or None for the config's data.
      config: as a config file returns it, or resolved; reads `data` and `tokenizer`. Without it, `name` or else the
        file at `path` sets the tokenizer.
      name: overrides `config.tokenizer.name`.
      path: overrides `config.tokenizer.path`.
      image_size: overrides `config.data.image_size`; 256 without a config.
      num_images: the number of images, at most; the first ones are used.
      batch_size: images at a time.
      seed: of the draws from a KL posterior.
      out: a folder for the picture of originals beside reconstructions; None for no picture.

    Returns:
      `num_images`, `image_size`, `mse` (of values in [-1, 1], to which reconstructions are clipped) and its `psnr` (dB,
      peak to peak 2); of the unscaled latents `mean`, `std` (over all values), `channel_means`, `channel_stds` and
      `scale` (1 / std); `codes_used` of a discrete tokenizer; `picture`, if drawn.

    Raises:
      UserError: no images, an unreadable one, or an invalid tokenizer.
    """
    check_arguments(num_images=num_images, batch_size=batch_size, seed=seed, image_size=image_size)
    if images is None and config is None:
        raise UserError("no images; give --images DIR, or --config NAME for its data")
    tokenizer, data = _open(config, name, path, image_size)
    batch_size = min(batch_size, num_images)
    batches = read_images(data, batch_size) if images is None else _read_folder(images, data, batch_size)
    report, originals, made = measure(tokenizer, batches, num_images, seed, before=lambda: out and make_folder(out))
    report["image_size"] = int(data.image_size)
    if out is not None:
        columns = math.ceil(math.sqrt(len(originals)))
        write_png(epath.Path(out) / PICTURE, beside([grid(each, columns) for each in (originals, made)]))
        report["picture"] = os.fspath(epath.Path(out) / PICTURE)
    return report


Batch = tuple[np.ndarray, int]  # uint8 (B, S, S, C), padded to one B, and the number of images


@numerics.pinned()
def measure(
    tokenizer: Tokenizer,
    batches: Generator[Batch],
    num_images: int,
    seed: int,
    *,
    before: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Encodes and decodes images; closes `batches`.

    Args:
      tokenizer: the tokenizer; statistics of its latents exclude its `scale`.
      batches: of images.
      num_images: the number of images, at most; at least 1.
      seed: of the draws from a KL posterior.
      before: called once the first batch has been read and has a valid size.

    Returns:
      The dict of `check` without `image_size` and `picture`; the first images, uint8 (N, S, S, C); and their
      reconstructions.
    """
    book = tokenizer.params.get("codebook") if isinstance(tokenizer.params, dict) else None

    @jax.jit
    def run(params: Any, original: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        latent = tokenizer.encode(params, original, key)
        unscaled, codes = latent / tokenizer.scale, None
        if book is not None and latent.shape[-1] == book.shape[-1]:
            codes = nearest(unscaled, params["codebook"])
        return unscaled, jnp.clip(tokenizer.decode(params, latent), -1.0, 1.0), codes

    error, seen, originals, made = 0.0, 0, [], []
    sums: Any = 0.0
    squares: Any = 0.0
    used: set[int] = set()
    with contextlib.closing(batches), contextlib.ExitStack() as closing:
        first = next(batches)
        image = jax.ShapeDtypeStruct(first[0].shape, np.float32)
        jax.eval_shape(run, tokenizer.params, image, numerics.key(0))
        before()
        bar = closing.enter_context(progress.bar("encoding and decoding", num_images, "images"))
        params = jax.device_put(tokenizer.params)
        for batch, real in itertools.chain([first], batches):
            real = min(real, num_images - seen)
            original = batch.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
            latent, back, codes = jax.device_get(run(params, original, jax.random.fold_in(numerics.key(seed), seen)))
            error += float(np.sum(np.square(back[:real] - original[:real], dtype=np.float64)))
            rows = latent[:real].reshape(-1, latent.shape[-1]).astype(np.float64)
            sums, squares, places = sums + rows.sum(0), squares + (rows**2).sum(0), len(rows) // real
            used.update([] if codes is None else np.unique(codes[:real]).tolist())
            if seen < _SHOWN:
                originals.append(batch[:real])
                made.append(to_uint8(back[:real]))
            seen += real
            bar.update(real)
            if seen == num_images:
                break
        bar.total = seen
    mse = error / (seen * first[0][0].size)
    means, mean_squares = sums / (seen * places), squares / (seen * places)
    std = math.sqrt(max(0.0, mean_squares.mean() - means.mean() ** 2))
    report: dict[str, Any] = {
        "num_images": seen,
        "mse": mse,
        "psnr": psnr(mse),
        "mean": float(means.mean()),
        "std": std,
        "scale": 1.0 / std if std else math.inf,
        "channel_means": means.tolist(),
        "channel_stds": np.sqrt(np.maximum(0.0, mean_squares - means**2)).tolist(),
    }
    if used:
        report["codes_used"] = len(used)
    return report, np.concatenate(originals)[:_SHOWN], np.concatenate(made)[:_SHOWN]


def psnr(mse: float) -> float:
    """In dB, peak to peak 2."""
    return 10.0 * math.log10(4.0 / mse) if mse else math.inf


def _open(
    config: ml_collections.ConfigDict | None, name: str, path: str, image_size: int | None
) -> tuple[Tokenizer, DataConfig]:
    """The tokenizer, and how to read images."""
    given: dict[str, Any] = {"tokenizer.name": name, "tokenizer.path": path, "data.image_size": image_size}
    given = {key: value for key, value in given.items() if value}
    if config is None and not name:
        from marjax.tokenizers import autoencoder_file

        if not path:
            raise UserError("no tokenizer; give --path FILE.safetensors, --name or --config NAME")
        try:
            stored = autoencoder_file.read(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; give the .safetensors file of an autoencoder") from None
        data = config_lib.data_config(config_lib.base())
        data = dataclasses.replace(data, image_size=image_size or 256, channels=stored.spec.in_channels)
        return make_tokenizer(stored.spec.kind, dataclasses.replace(stored, scale=1.0)), data
    base = config_lib.base() if config is None else config
    if config is None:
        base.data.update(image_size=256, channels=3)
    base = config_lib.check_fields(config_lib.apply_overrides(base, given))
    kind = autoencoder_spec.AUTOENCODERS.get(base.tokenizer.name)
    if kind is not None and not kind.discrete:
        base.tokenizer.autoencoder.scale = 1.0  # to be measured
    config_lib.tokens_of(base)
    config_lib.fill_tokenizer(base)
    return open_tokenizer(config_lib.tokenizer_config(base)), config_lib.data_config(base)


def read_images(data: DataConfig, batch_size: int) -> Generator[Batch]:
    """Yields the images of `data` once, in its order, without flips."""
    with Batches(data, batch_size, 0, train=False) as batches:
        left = batches.num_examples
        for batch in batches:
            yield batch["image"], min(left, batch_size)
            left -= batch_size


def _read_folder(folder: str | os.PathLike[str], data: DataConfig, batch_size: int) -> Generator[Batch]:
    preprocess = Preprocess(data.image_size, data.channels, flip=False)
    unused = np.random.default_rng(0)  # without flips, nothing is drawn
    paths = pictures(folder)
    for at in range(0, len(paths), batch_size):
        rows = [
            preprocess({"image": read_picture(path), "label": 0}, unused)["image"]
            for path in paths[at : at + batch_size]
        ]
        yield np.stack(rows + rows[-1:] * (batch_size - len(rows))), len(rows)
