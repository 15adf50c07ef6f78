"""Trains a codebook by k-means over the patches of all images.

Shapes: N images, L patches per image, K codes, D values per code, P patches for k-means, U distinct ones among them.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from marjax import config as config_lib
from marjax import distributed, numerics, progress
from marjax.data.config import DataConfig
from marjax.data.pipeline import Batches
from marjax.errors import UserError
from marjax.files import make_folder
from marjax.images import write_npz
from marjax.lock import locked_file
from marjax.paths import takes_paths
from marjax.ranges import check_arguments
from marjax.tokenizer_training.reconstruction import psnr
from marjax.tokenizers import TokenShape
from marjax.tokenizers.codebook import Codebook, Fit, arrays_of, read
from marjax.tokenizers.nearest_code import nearest

MAX_PATCHES = 500_000  # for k-means; drawn uniformly without replacement from larger data sets
_LOOKED_UP = 16_384  # patches encoded at a time, each of which needs memory for K values


@numerics.pinned()
@takes_paths("path")
def train_codebook(
    config: ml_collections.ConfigDict, path: str | os.PathLike[str], *, seed: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Fits K codes to the patches of `config.data` and writes them to one file.

    Images are read without flips. All patches, or MAX_PATCHES of them, go through k-means (k-means++, then Lloyd's
    iterations on one thread, so that the order of sums is fixed). The error is measured on all images. The same config,
    seed and libraries give the same file.

    Args:
      config: as a config file returns it, or resolved; reads `data` and `tokenizer`.
      path: the .npz file; its folder is created if missing.
      seed: of the choice of patches and of k-means; by default `config.seed`.
      overwrite: whether to replace a file with other contents.

    Returns:
      `path`, `checksum`, `num_codes`, `codes_used` (by at least one patch), `num_images`, `mse` (of values in [-1, 1]),
      `psnr` (dB, peak to peak 2) and `seconds`.

    Raises:
      UserError: another tokenizer than codebook, fewer distinct patches than codes, unreadable data, or a file that
        cannot or may not be written.
    """
    start = time.perf_counter()
    check_arguments(seed=seed)
    config = config_lib.resolve(config)
    if config.tokenizer.name != "codebook":
        raise UserError(f"config.tokenizer.name={config.tokenizer.name!r} is not trained by k-means; use 'codebook'")
    seed = config.seed if seed is None else seed
    tokens, data = config_lib.tokens_of(config), config_lib.data_config(config)
    source = f"{data.source}, split {data.split}, {data.image_size} x {data.image_size}"
    old = None if overwrite else _read_old(path)
    if old is not None:
        compared = {
            "codes": (old[0].num_codes, tokens.num_codes),
            "patch_size": (old[0].patch_size, tokens.patch),
            "channels": (old[0].channels, tokens.channels),
            "seed": (old[1].seed, seed),
            "data": (old[1].source, source),
        }
        _refuse(path, [f"{key} {was!r}, not {now!r}" for key, (was, now) in compared.items() if was != now])

    with progress.activity("reading the images"):
        patches_PxD, num_images = _draw_patches(data, tokens, seed)
    distinct_UxD, counts_U = np.unique(patches_PxD, axis=0, return_counts=True)
    if len(distinct_UxD) < tokens.num_codes:
        raise UserError(
            f"config.tokenizer.num_codes={tokens.num_codes} is more than the {len(distinct_UxD)} distinct patches of "
            f"{source}; use at most {len(distinct_UxD)}"
        )
    make_folder(epath.Path(path).parent)  # fails before the work
    with distributed.first_holds(locked_file(path, "marjax train-tokenizer")):
        codes = _kmeans(_normalised(distinct_UxD), counts_U, tokens.num_codes, seed)
        codebook = Codebook(codes, tokens.patch, tokens.channels)
        mse, codes_used = _reconstruction(data, tokens, codebook)
        fit = Fit(mse, psnr(mse), num_images, seed, source)
        if old is None:
            distributed.on_first(lambda: write_npz(path, **arrays_of(codebook, fit)))
        elif old[0].checksum != codebook.checksum or old[1] != fit:
            _refuse(path, [f"mse {old[1].mse:.6g}, not {mse:.6g}, for the same settings"])
    return {
        "path": os.fspath(path),
        "checksum": codebook.checksum,
        "num_codes": codebook.num_codes,
        "codes_used": codes_used,
        "num_images": num_images,
        "mse": mse,
        "psnr": fit.psnr,
        "seconds": time.perf_counter() - start,
    }


def _read_old(path: str | os.PathLike[str]) -> tuple[Codebook, Fit] | None:
    if epath.Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the name of a file, such as codebook.npz")
    try:
        return read(path)
    except FileNotFoundError:
        return None


def _refuse(path: str | os.PathLike[str], differences: list[str]) -> None:
    if differences:
        raise UserError(
            f"{path} holds another codebook ({'; '.join(differences)}); give another --out or --overwrite it"
        )


def _images(data: DataConfig, tokens: TokenShape, what: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yields all images in the source's order, uint8 (B, S, S, C) padded to one B, and their number."""
    batch_size = max(1, _LOOKED_UP // tokens.num_tokens)
    with Batches(data, batch_size, 0, train=False) as batches:
        left = batches.num_examples
        with progress.bar(what, left, "images") as bar:
            for batch in batches:
                count = min(left, batch_size)
                yield batch["image"], count
                bar.update(count)
                left -= count


def _draw_patches(data: DataConfig, tokens: TokenShape, seed: int) -> tuple[np.ndarray, int]:
    """Patches uint8 (P, D) in the data's order, and N."""
    with Batches(data, 1, 0, train=False) as batches:
        num_images = batches.num_examples
    total = num_images * tokens.num_tokens
    chosen = (
        np.arange(total)
        if total <= MAX_PATCHES
        else np.sort(np.random.default_rng(seed).choice(total, MAX_PATCHES, replace=False, shuffle=False))
    )
    drawn, first = [], 0
    for images, count in _images(data, tokens, "reading"):
        rows = count * tokens.num_tokens
        begin, end = np.searchsorted(chosen, (first, first + rows))
        patches: Any = tokens.patchify(images)  # type: ignore[arg-type]  # takes NumPy arrays too
        drawn.append(patches.reshape(-1, tokens.token_dim)[chosen[begin:end] - first])
        first += rows
    return np.concatenate(drawn), num_images


def _normalised(pixels: np.ndarray) -> np.ndarray:
    """Converts uint8 to float32 in [-1, 1], as the train step does."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def _kmeans(patches_UxD: np.ndarray, counts_U: np.ndarray, num_codes: int, seed: int) -> np.ndarray:
    """K codes, float32 (K, D)."""
    from sklearn.cluster import KMeans  # slow
    from threadpoolctl import threadpool_limits

    random_state = int(np.random.default_rng(seed).integers(2**32))
    # On MNIST, mini-batches more than double the error, and more iterations gain nothing.
    kmeans = KMeans(num_codes, n_init=1, max_iter=50, tol=1e-5, random_state=random_state)
    with threadpool_limits(limits=1), progress.activity(f"k-means of {len(patches_UxD):,} patches"):
        kmeans.fit(patches_UxD, sample_weight=counts_U.astype(np.float32))
    return np.ascontiguousarray(kmeans.cluster_centers_, np.float32)


def _reconstruction(data: DataConfig, tokens: TokenShape, codebook: Codebook) -> tuple[float, int]:
    """The mean squared error of all images after quantisation, and the number of codes used."""

    @jax.jit
    def encode(params: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        latent = codebook.encode(params, image, numerics.key(0))
        return latent, nearest(tokens.patchify(latent), codebook.codebook(params))

    error, values, used = 0.0, 0, np.zeros(codebook.num_codes, bool)
    for images, count in _images(data, tokens, "measuring"):
        image = _normalised(images)
        latent, index = jax.device_get(encode(codebook.params, image))
        error += float(np.sum(np.square(latent[:count] - image[:count], dtype=np.float64)))
        values += image[:count].size
        used[index[:count]] = True
    return error / values, int(used.sum())
