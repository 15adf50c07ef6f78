"""Training of a codebook: k-means over the patches of all images.

Shapes: N images, L patches an image, K codes of D values, P patches k-means sees, U different ones among them.
"""

import math
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
from marjax.data.pipeline import Batches
from marjax.errors import UserError
from marjax.files import make_folder
from marjax.images import write_npz
from marjax.lock import locked_file
from marjax.paths import takes_paths
from marjax.ranges import check_arguments
from marjax.tokenizers import TokenShape
from marjax.tokenizers.codebook import Codebook, Fit, arrays_of, read
from marjax.tokenizers.nearest_code import nearest

# Of larger data sets, k-means sees this many patches, drawn evenly without replacement.
MAX_PATCHES = 500_000
# Patches looked up at a time, which takes memory for K values each.
_LOOKED_UP = 16_384


@numerics.pinned()
@takes_paths("path")
def train_codebook(
    config: ml_collections.ConfigDict, path: str | os.PathLike[str], *, seed: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Finds the K codes that the patches of `config.data` are nearest to, and writes them to one file.

    Images are read without flips. All their patches, or MAX_PATCHES of them, go through k-means (k-means++, then
    Lloyd's iterations on one thread, so that sums have one order); the error is measured on all images. The same
    config, seed and libraries give the same file.

    Args:
      config: as a config file returns it, or resolved; `data` and `tokenizer` count.
      path: the .npz file; its folder is made if need be.
      seed: of the patches drawn and of k-means; by default `config.seed`.
      overwrite: whether a file with other contents may be replaced.

    Returns:
      `path`, `checksum`, `num_codes`, `codes_used` (by at least one patch), `num_images`, `mse` (of values in [-1, 1]),
      `psnr` (dB, peak to peak 2) and `seconds`.

    Raises:
      UserError: a tokenizer that cannot be trained, fewer different patches than codes, data that cannot be read, or a
        file that cannot or may not be written.
    """
    start = time.perf_counter()
    check_arguments(seed=seed)
    config = config_lib.resolve(config)
    if config.tokenizer.name != "codebook":
        raise UserError(
            f"config.tokenizer.name is {config.tokenizer.name!r}, which cannot be trained here: give 'codebook'"
        )
    seed = config.seed if seed is None else seed
    tokens, data = config_lib.tokens_of(config), config.data
    source = f"{data.source}, split {data.split}, {data.image_size} x {data.image_size}"
    old = None if overwrite else _read_old(path)
    if old is not None:
        given = {
            "codes": old[0].num_codes,
            "patch_size": old[0].patch_size,
            "channels": old[0].channels,
            "seed": old[1].seed,
            "data": old[1].source,
        }
        wanted = {
            "codes": tokens.num_codes,
            "patch_size": tokens.patch,
            "channels": tokens.channels,
            "seed": seed,
            "data": source,
        }
        _refuse(path, [f"{key} {given[key]!r}, not {wanted[key]!r}" for key in wanted if given[key] != wanted[key]])

    with progress.activity("reading the images"):  # errors follow: the bar inside is not shown at once
        patches_PxD, num_images = _draw_patches(config, tokens, seed)
    distinct_UxD, counts_U = np.unique(patches_PxD, axis=0, return_counts=True)
    if len(distinct_UxD) < tokens.num_codes:
        raise UserError(
            f"config.tokenizer.num_codes is {tokens.num_codes}, but the patches of {source}, are of only "
            f"{len(distinct_UxD)} kinds: give at most {len(distinct_UxD)}"
        )
    make_folder(epath.Path(path).parent)  # before the work, which would be lost
    with distributed.first_holds(locked_file(path, "marjax train-tokenizer")):
        codes = _kmeans(_normalised(distinct_UxD), counts_U, tokens.num_codes, seed)
        codebook = Codebook(codes, tokens.patch, tokens.channels)
        mse, codes_used = _reconstruction(config, tokens, codebook)
        psnr = 10.0 * math.log10(4.0 / mse) if mse else math.inf
        fit = Fit(mse, psnr, num_images, seed, source)
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
        "psnr": psnr,
        "seconds": time.perf_counter() - start,
    }


def _read_old(path: str | os.PathLike[str]) -> tuple[Codebook, Fit] | None:
    if epath.Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the name of a file in it, such as codebook.npz")
    try:
        return read(path)
    except FileNotFoundError:
        return None


def _refuse(path: str | os.PathLike[str], differences: list[str]) -> None:
    if differences:
        raise UserError(
            f"{path} holds another codebook ({'; '.join(differences)}): give another file, or --overwrite this one"
        )


def _images(
    config: ml_collections.ConfigDict, tokens: TokenShape, seed: int, what: str
) -> Iterator[tuple[np.ndarray, int]]:
    """All images in the source's order, uint8 (B, S, S, C) with B the same for all, and how many of the B count."""
    batch_size = max(1, _LOOKED_UP // tokens.num_tokens)
    with Batches(config_lib.data_config(config), batch_size, seed, train=False) as batches:
        left = batches.num_examples
        with progress.bar(what, left, "images") as bar:
            for batch in batches:
                count = min(left, batch_size)
                yield batch["image"], count
                bar.update(count)
                left -= count


def _draw_patches(config: ml_collections.ConfigDict, tokens: TokenShape, seed: int) -> tuple[np.ndarray, int]:
    """Patches uint8 (P, D) in the data's order, and N."""
    with Batches(config_lib.data_config(config), 1, seed, train=False) as batches:
        num_images = batches.num_examples
    total = num_images * tokens.num_tokens
    chosen = (
        np.arange(total)
        if total <= MAX_PATCHES
        else np.sort(np.random.default_rng(seed).choice(total, MAX_PATCHES, replace=False, shuffle=False))
    )
    drawn, first = [], 0
    for images, count in _images(config, tokens, seed, "reading"):
        rows = count * tokens.num_tokens
        begin, end = np.searchsorted(chosen, (first, first + rows))
        patches: Any = tokens.patchify(images)  # type: ignore[arg-type]  # the same of a NumPy array
        drawn.append(patches.reshape(-1, tokens.token_dim)[chosen[begin:end] - first])
        first += rows
    return np.concatenate(drawn), num_images


def _normalised(pixels: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] from uint8, as in the train step."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def _kmeans(patches_UxD: np.ndarray, counts_U: np.ndarray, num_codes: int, seed: int) -> np.ndarray:
    """K codes, float32 (K, D)."""
    from sklearn.cluster import KMeans  # takes a second
    from threadpoolctl import threadpool_limits

    random_state = int(np.random.default_rng(seed).integers(2**32))
    # Not mini-batches: on MNIST they are quicker but leave more than twice the error. More iterations gain nothing.
    kmeans = KMeans(num_codes, n_init=1, max_iter=50, tol=1e-5, random_state=random_state)
    with threadpool_limits(limits=1), progress.activity(f"k-means of {len(patches_UxD):,} patches"):
        kmeans.fit(patches_UxD, sample_weight=counts_U.astype(np.float32))
    return np.ascontiguousarray(kmeans.cluster_centers_, np.float32)


def _reconstruction(config: ml_collections.ConfigDict, tokens: TokenShape, codebook: Codebook) -> tuple[float, int]:
    """Mean squared error of what `encode` makes of all images, and how many codes it uses."""

    @jax.jit
    def encode(params: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        latent = codebook.encode(params, image, numerics.key(0))
        return latent, nearest(tokens.patchify(latent), codebook.codebook(params))

    error, values, used = 0.0, 0, np.zeros(codebook.num_codes, bool)
    for images, count in _images(config, tokens, 0, "measuring"):
        image = _normalised(images)
        latent, index = jax.device_get(encode(codebook.params, image))
        error += float(np.sum(np.square(latent[:count] - image[:count], dtype=np.float64)))
        values += image[:count].size
        used[index[:count]] = True
    return error / values, int(used.sum())
