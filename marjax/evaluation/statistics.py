"""Statistics files: what samples are measured against, as others and as we write it.

Legend: N images, F features, S spatial features.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from marjax import numerics, progress
from marjax.errors import UserError, shortened
from marjax.evaluation.across_processes import Processes
from marjax.evaluation.image_sets import Batch, NpzImages
from marjax.evaluation.metrics.frechet import Gaussian, Moments
from marjax.evaluation.networks.extractor import FeatureExtractor
from marjax.files import open_regular
from marjax.images import write_npz
from marjax.json_file import parse_json
from marjax.npz_file import NpzFile
from marjax.paths import takes_paths

FORMAT = 1
_ADVICE = "give another npz file of statistics or images, or make it with marjax stats"
_LARGEST = 1e18  # of a value, so that its square and sums of those are finite in float32
_STYLES = ("mu", "sigma"), ("ref_mu", "ref_sigma")


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is known of a set of real images; None where it is not.

    Attributes:
      gaussian: of the features. Its `count` is 0 in files of others, which do not say it.
      spatial: of the spatial features.
      features: of some of the images, float32 (n, F).
      images: some of them, read from the file when they are asked for.
      extractor: the "name" and "checksum" of the network that made the features.
      source: where the images came from, for people; "" where the file does not say.
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
def read_reference(path: str | os.PathLike[str]) -> Reference:
    """Reads an npz file of statistics.

    It may be one of ours, a reference batch of the ADM evaluator (`mu`, `sigma`, `mu_s`, `sigma_s`, images `arr_0`),
    `mu` and `sigma` as of pytorch-fid, torch-fidelity or the reference, `ref_mu` and `ref_sigma`, or images alone. Of
    images only the header is read.

    Raises:
      UserError: no such file, one of another kind, or arrays that cannot be what their names say.
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
            listed = ", ".join(map(shortened, file.names[:20]))
            raise UserError(
                f"{path} holds {listed or 'nothing'}, expected statistics (mu and sigma, or ref_mu and "
                f"ref_sigma) or images (arr_0); {_ADVICE}"
            )
        features = None
        if "features" in names:
            shape = file.header("features", ("f", 2)).shape
            if gaussian is None or shape[1:] != gaussian.mean.shape:
                raise UserError(
                    f"{path}: features has the shape {shape}, which does not go with the file's mean; {_ADVICE}"
                )
            features = _array(file, "features", 2)
    images = NpzImages(path) if "arr_0" in names else None
    with open_regular(path) as stored:
        checksum = hashlib.file_digest(stored, "sha256").hexdigest()  # type: ignore[arg-type]
    return Reference(
        gaussian,
        spatial,
        None if features is None else features.astype(np.float32),
        images,
        meta.get("extractor"),
        meta.get("source", ""),
        path,
        checksum,
    )


def write_reference(path: str | os.PathLike[str], reference: Reference) -> Reference:
    """Writes all but `images` as one npz file, whole or not at all; the same content gives the same bytes.

    Returns:
      The reference with the file's path and checksum.

    Raises:
      UserError: the file cannot be written.
      ValueError: there are no statistics.
    """
    if reference.gaussian is None:
        raise ValueError("a reference without statistics: make them first")
    meta = {
        "format": FORMAT,
        "count": reference.gaussian.count,
        "source": reference.source,
        "extractor": reference.extractor,
    }
    arrays: dict[str, Any] = {"mu": reference.gaussian.mean, "sigma": reference.gaussian.cov, "meta": json.dumps(meta)}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.cov}
    if reference.features is not None:
        arrays["features"] = reference.features
    write_npz(path, **arrays)
    with epath.Path(path).open("rb") as stored:
        checksum = hashlib.file_digest(stored, "sha256").hexdigest()
    return dataclasses.replace(reference, path=os.fspath(path), checksum=checksum, images=None)


@numerics.pinned()
def make_reference(
    batches: Iterable[Batch],
    total: int,
    extractor: FeatureExtractor,
    *,
    source: str = "",
    keep_features: int = 10_000,
    seed: int = 0,
    processes: Processes | None = None,
) -> Reference:
    """Sends images through a network; every host calls it with its share of them, and all get the same.

    Args:
      batches: indices int (B,) and images uint8 (B, H, W, C); each index of [0, total) once over all processes.
      total: N, at least 2.
      extractor: the network.
      source: see `Reference`.
      keep_features: of how many images, at most, the features are kept, in the order of their indices.
      seed: of their choice, which follows from it, `keep_features` and N alone.
      processes: those that share the images.

    Raises:
      UserError: fewer than 2 images.
      ValueError: an image is missing or came twice, or one that the network does not take.
    """
    if total < 2:
        raise UserError(f"{total} images have no statistics: give at least 2")
    processes = processes or Processes()
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
            f"{(times_N != 1).sum()} of {total} images are missing or came more than once: give each image once"
        )
    if processes.count > 1:
        for start in range(0, len(kept_nxF), 1024):  # as float64 only in parts
            some = slice(start, start + 1024)
            kept_nxF[some] = processes.sum(kept_nxF[some].astype(np.float64))
    return Reference(
        moments.merged(processes).gaussian(),
        spatial.merged(processes).gaussian() if extractor.num_spatial else None,
        kept_nxF if len(kept_nxF) else None,
        extractor={"name": extractor.name, "checksum": extractor.checksum},
        source=source,
    )


def _gaussian(file: NpzFile, mean_key: str, cov_key: str, count: int) -> Gaussian:
    mean_F = _array(file, mean_key, 1).astype(np.float64)
    shape = file.header(cov_key, ("f", 2)).shape
    if shape != (len(mean_F), len(mean_F)):
        raise UserError(
            f"{file.path}: {cov_key} has the shape {shape}, expected {(len(mean_F), len(mean_F))} to go "
            f"with {mean_key}; {_ADVICE}"
        )
    cov_FxF = _array(file, cov_key, 2).astype(np.float64)
    if np.abs(cov_FxF - cov_FxF.T).max() > 1e-5 * np.abs(cov_FxF).max() or cov_FxF.diagonal().min() < 0:
        raise UserError(
            f"{file.path}: {cov_key} is no covariance (not symmetric, or with negative variances); {_ADVICE}"
        )
    return Gaussian(mean_F, cov_FxF, count)


def _array(file: NpzFile, key: str, ndim: int) -> np.ndarray:
    array = file.read(key, ("f", ndim))
    if not array.size or not (np.abs(array) < _LARGEST).all():
        raise UserError(f"{file.path}: {key} holds values that are not finite or far too large, or none; {_ADVICE}")
    return array


def _meta(path: str, stored: np.ndarray) -> dict[str, Any]:
    """What our own files say beside their arrays."""
    name = re.compile(r"[ -~]*")
    shape = {
        "format": {FORMAT},
        "count": range(1 << 53),
        "source": str,
        "extractor": (None, {"name": name, "checksum": name}),
    }
    meta: dict[str, Any] = parse_json(str(stored), shape, where=f"{path}: meta", advice=_ADVICE)
    return meta
