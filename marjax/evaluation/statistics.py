"""Dataset statistics, which samples are measured against: computing them, and reading and writing their files.

Legend: N images, F features, S spatial features.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from marjax import config as config_lib
from marjax import distributed, numerics, progress
from marjax.errors import UserError, listed, shortened
from marjax.evaluation.across_processes import ALONE, Processes, all_processes
from marjax.evaluation.image_sets import Batch, ConfigImages, FolderImages, ImageSet, NpzImages
from marjax.evaluation.metrics.frechet import Gaussian, Moments
from marjax.evaluation.networks.extractor import FeatureExtractor, identity
from marjax.evaluation.networks.open_extractor import open_extractor
from marjax.files import make_folder, open_regular
from marjax.images import write_npz
from marjax.json_file import parse_json
from marjax.lock import locked_file
from marjax.npz_file import NpzFile
from marjax.paths import takes_paths
from marjax.ranges import check_arguments

FORMAT = 1
_ADVICE = "give an npz file of statistics or images, as marjax stats writes"
_LARGEST = 1e18  # so that sums of squared values are finite in float32
_STYLES = ("mu", "sigma"), ("ref_mu", "ref_sigma")


@dataclasses.dataclass(frozen=True)
class DatasetStatistics:
    """Statistics of a set of real images; None for what is unknown.

    Attributes:
      gaussian: of the features; `count` is 0 in files that do not store it.
      spatial: of the spatial features.
      features: of some of the images, float32 (n, F).
      images: some of the images, read lazily from the file.
      extractor: "name" and "checksum" of the network that made the features.
      source: where the images came from, for people; "" if unknown.
      path: of the file; "" before it is written.
      checksum: SHA-256 of the file.
    """

    gaussian: Gaussian | None = None
    spatial: Gaussian | None = None
    features: np.ndarray | None = None
    images: NpzImages | None = None
    extractor: dict[str, str] | None = None
    source: str = ""
    path: str = ""
    checksum: str = ""

    @property
    def name(self) -> str:
        """The file's name, without folders."""
        return os.path.basename(self.path)


@takes_paths("path")
def read_statistics(path: str | os.PathLike[str]) -> DatasetStatistics:
    """Reads an npz file of statistics.

    The file is one of ours, a reference batch of the ADM evaluator (`mu`, `sigma`, `mu_s`, `sigma_s`, images `arr_0`),
    has `mu` and `sigma` (pytorch-fid, torch-fidelity, the reference) or `ref_mu` and `ref_sigma`, or has images only.
    Only the header of images is read.

    Raises:
      UserError: no such file, one of another kind, or invalid arrays.
    """
    path = os.fspath(path)
    with NpzFile(path, advice=_ADVICE) as file:
        names = set(file.names)
        meta = _meta(path, file.read("meta", ("U", 0))) if "meta" in names else {}
        count = meta.get("count", 0)
        keys = next((style for style in _STYLES if names & set(style)), None)
        gaussian = keys and _gaussian(file, *keys, count)
        spatial = _gaussian(file, "mu_s", "sigma_s", count) if names & {"mu_s", "sigma_s"} else None
        if gaussian is None and "arr_0" not in names:
            found = listed([shortened(name) for name in file.names]) or "nothing"
            raise UserError(f"{path} has {found}, expected mu and sigma, ref_mu and ref_sigma, or arr_0; {_ADVICE}")
        features = None
        if "features" in names:
            shape = file.header("features", ("f", 2)).shape
            if gaussian is None or shape[1:] != gaussian.mean.shape:
                raise UserError(f"{path}: features has the shape {shape}, which does not fit the mean; {_ADVICE}")
            features = _array(file, "features", 2).astype(np.float32)
    images = NpzImages(path) if "arr_0" in names else None
    with open_regular(path) as stored:
        checksum = hashlib.file_digest(stored, "sha256").hexdigest()  # type: ignore[arg-type]
    return DatasetStatistics(
        gaussian, spatial, features, images, meta.get("extractor"), meta.get("source", ""), path, checksum
    )


def write_statistics(path: str | os.PathLike[str], statistics: DatasetStatistics) -> DatasetStatistics:
    """Writes all but `images` as one npz file; atomic, and the same content gives the same bytes.

    Returns:
      The statistics with the file's path and checksum.

    Raises:
      UserError: the file cannot be written.
      ValueError: there is no mean and covariance.
    """
    if statistics.gaussian is None:
        raise ValueError("statistics.gaussian is None; compute it first")
    meta = {
        "format": FORMAT,
        "count": statistics.gaussian.count,
        "source": statistics.source,
        "extractor": statistics.extractor,
    }
    arrays: dict[str, Any] = {
        "mu": statistics.gaussian.mean,
        "sigma": statistics.gaussian.cov,
        "meta": json.dumps(meta),
    }
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.cov}
    if statistics.features is not None:
        arrays["features"] = statistics.features
    write_npz(path, **arrays)
    with epath.Path(path).open("rb") as stored:
        checksum = hashlib.file_digest(stored, "sha256").hexdigest()
    return dataclasses.replace(statistics, path=os.fspath(path), checksum=checksum, images=None)


@numerics.pinned()
def compute_statistics(
    batches: Iterable[Batch],
    total: int,
    extractor: FeatureExtractor,
    *,
    source: str = "",
    keep_features: int = 10_000,
    seed: int = 0,
    processes: Processes = ALONE,
) -> DatasetStatistics:
    """Computes statistics of images; every process calls this with its share and gets the same result.

    Args:
      batches: indices int (B,) and images uint8 (B, H, W, C); each index of [0, total) once over all processes.
      total: N, at least 2.
      extractor: the network.
      source: see `DatasetStatistics`.
      keep_features: the number of images, at most, whose features are kept, in the order of their indices.
      seed: of the choice of these images, which depends on `seed`, `keep_features` and N only.
      processes: those that share the images.

    Raises:
      UserError: fewer than 2 images.
      ValueError: an image is missing or came twice, or the network does not take it.
    """
    if total < 2:
        raise UserError(f"number of images is {total}; statistics need at least 2")
    moments, spatial = Moments(extractor.num_features), Moments(extractor.num_spatial)
    chosen = np.sort(np.random.RandomState(seed).permutation(total)[:keep_features])
    place_N = np.full(total, -1)
    place_N[chosen] = np.arange(len(chosen))
    kept_nxF = np.zeros((len(chosen), extractor.num_features), np.float32)
    times_N = np.zeros(total, np.int64)
    with progress.bar("measuring", -(-total // processes.count), "images") as bar:
        for indices_B, images in batches:
            found = extractor.extract(images)
            np.add.at(times_N, indices_B, 1)
            moments.add(found.features)
            if found.spatial is not None:
                spatial.add(found.spatial)
            places_B = place_N[indices_B]
            kept_nxF[places_B[places_B >= 0]] = found.features[places_B >= 0]
            bar.update(len(images))
    times_N = processes.sum(times_N)
    if (times_N != 1).any():
        raise ValueError(
            f"{(times_N != 1).sum()} of {total} images are missing or came more than once; give each image once"
        )
    if processes.count > 1:
        for start in range(0, len(kept_nxF), 1024):  # in parts, because float64 takes twice the memory
            some = slice(start, start + 1024)
            kept_nxF[some] = processes.sum(kept_nxF[some].astype(np.float64))
    return DatasetStatistics(
        moments.merged(processes).gaussian(),
        spatial.merged(processes).gaussian() if extractor.num_spatial else None,
        kept_nxF if len(kept_nxF) else None,
        extractor=identity(extractor),
        source=source,
    )


def _gaussian(file: NpzFile, mean_key: str, cov_key: str, count: int) -> Gaussian:
    mean_F = _array(file, mean_key, 1).astype(np.float64)
    shape = file.header(cov_key, ("f", 2)).shape
    if shape != (len(mean_F), len(mean_F)):
        raise UserError(
            f"{file.path}: {cov_key} has the shape {shape}, expected {(len(mean_F), len(mean_F))} as {mean_key} has "
            f"{len(mean_F)} values; {_ADVICE}"
        )
    cov_FxF = _array(file, cov_key, 2).astype(np.float64)
    if np.abs(cov_FxF - cov_FxF.T).max() > 1e-5 * np.abs(cov_FxF).max() or cov_FxF.diagonal().min() < 0:
        raise UserError(
            f"{file.path}: {cov_key} is not a covariance (asymmetric, or with negative variances); {_ADVICE}"
        )
    return Gaussian(mean_F, cov_FxF, count)


def _array(file: NpzFile, key: str, ndim: int) -> np.ndarray:
    array = file.read(key, ("f", ndim))
    if not array.size or not (np.abs(array) < _LARGEST).all():
        raise UserError(f"{file.path}: {key} is empty or has values that are not finite or too large; {_ADVICE}")
    return array


def _meta(path: str, stored: np.ndarray) -> dict[str, Any]:
    """The metadata of our files."""
    name = re.compile(r"[ -~]*")
    shape = {
        "format": {FORMAT},
        "count": range(1 << 53),
        "source": str,
        "extractor": (None, {"name": name, "checksum": name}),
    }
    meta: dict[str, Any] = parse_json(str(stored), shape, where=f"{path}: meta", advice=_ADVICE)
    return meta


@numerics.pinned()
@takes_paths("out", "images", "npz", "extractor_path")
def make_statistics(
    out: str | os.PathLike[str],
    *,
    config: ml_collections.ConfigDict | None = None,
    images: str | os.PathLike[str] | None = None,
    npz: str | os.PathLike[str] | None = None,
    extractor: str | None = None,
    extractor_path: str | None = None,
    image_size: int | None = None,
    keep_features: int = 10_000,
    batch_size: int = 64,
    overwrite: bool = False,
) -> DatasetStatistics:
    """Computes dataset statistics and writes them to a file for `marjax evaluate`.

    With several processes, all must call this; each reads its share, and the first one writes.

    Args:
      out: the npz file. If it exists, the statistics are computed again and must equal it.
      config: the source of images: its data set, cropped as in training, without flips. `config.eval` sets the default
        extractor.
      images: another source: a folder of pictures.
      npz: another source: a file with images uint8 (N, H, W, C) as `arr_0`, such as the samples of another program.
      extractor, extractor_path: see `open_extractor`; inception by default.
      image_size: the size to which the pictures of a folder are cropped; by default they must have one size.
      keep_features: the number of images, at most, whose features are kept for precision, recall and KID.
      batch_size: images read at a time.
      overwrite: replace a file with other contents.

    Raises:
      UserError: not exactly one source, or invalid input.
    """
    if (images is None) + (npz is None) + (config is None) != 2:
        raise UserError("statistics need exactly one source; give --dataset NAME, --images DIR or --npz FILE")
    if image_size is not None and images is None:
        raise UserError("image_size applies to the pictures of a folder only; leave it out or give --images DIR")
    check_arguments(image_size=image_size, keep_features=keep_features, batch_size=batch_size)
    if config is not None:
        config = config_lib.check_fields(config)
    make_folder(os.path.dirname(os.fspath(out)) or ".")
    with distributed.first_holds(locked_file(out, "marjax stats")):
        existing = read_statistics(out) if epath.Path(out).exists() and not overwrite else None
        if config is not None:
            extractor = extractor or config.eval.extractor
            if extractor_path is None and extractor == config.eval.extractor:
                extractor_path = config.eval.extractor_path
        network = open_extractor(extractor or "inception", extractor_path or "")
        source: ImageSet
        if images is not None:
            source = FolderImages(images, image_size, getattr(network, "channels", 3))
        elif npz is not None:
            source = NpzImages(npz)
        else:
            assert config is not None
            config_lib.tokens_of(config)  # reports invalid sizes before reading any data
            source = ConfigImages(config_lib.data_config(config))
        differs = UserError(f"{os.fspath(out)} exists with other contents; give another --out or --overwrite it")
        if existing is not None:  # a cheap check before any image is read
            count = existing.gaussian and existing.gaussian.count
            if (existing.extractor, existing.source, count) != (identity(network), source.source, len(source)):
                raise differs
        processes = all_processes()
        try:
            made = compute_statistics(
                source.batches(batch_size, processes),
                len(source),
                network,
                source=source.source,
                keep_features=keep_features,
                processes=processes,
            )
        except ValueError as error:
            raise UserError(f"{source.source} cannot be measured by {network.name}: {error}") from None
        if existing is not None:
            if not _same(existing, made):
                raise differs
            return existing
        if processes.index == 0:
            write_statistics(out, made)
        processes.barrier()
        return read_statistics(out)


def _same(one: DatasetStatistics, other: DatasetStatistics) -> bool:
    """Whether the arrays are equal."""

    def arrays(statistics: DatasetStatistics) -> list[np.ndarray | None]:
        gaussians = [each for each in (statistics.gaussian, statistics.spatial) if each is not None]
        return [array for each in gaussians for array in (each.mean, each.cov)] + [statistics.features]

    a, b = arrays(one), arrays(other)
    return len(a) == len(b) and all(
        np.array_equal(x, y)  # type: ignore[arg-type]  # also of None
        for x, y in zip(a, b, strict=True)
    )
