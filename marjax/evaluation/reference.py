"""Statistics files: what samples are measured against, as others and as we write it.

Legend: N images, F features, S spatial features.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from marjax.errors import UserError
from marjax.evaluation.extractor import FeatureExtractor
from marjax.evaluation.frechet import Gaussian, Moments
from marjax.evaluation.hosts import Hosts
from marjax.evaluation.image_sets import Batch, NpzImages
from marjax.generation.images import write_npz

FORMAT = 1
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


def read_reference(path: str | os.PathLike[str]) -> Reference:
    """Reads an npz file of statistics.

    It may be one of ours, a reference batch of the ADM evaluator (`mu`, `sigma`, `mu_s`, `sigma_s`, images `arr_0`),
    `mu` and `sigma` as of pytorch-fid, torch-fidelity or the reference, `ref_mu` and `ref_sigma`, or images alone. Of
    images only the header is read.

    Raises:
      UserError: no such file, one of another kind, or arrays that cannot be what their names say.
    """
    path = os.fspath(path)
    with _told(path), epath.Path(path).open("rb") as stored:
        checksum = hashlib.file_digest(stored, "sha256").hexdigest()
        stored.seek(0)
        loaded = np.load(stored, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is one array, not an archive of named ones")
        with loaded as file:
            names = set(file.files)
            meta = _meta(path, file["meta"]) if "meta" in names else {}
            count = meta.get("count", 0)
            keys = next((style for style in _STYLES if names & set(style)), None)
            gaussian = keys and _gaussian(path, file, *keys, count)
            spatial = _gaussian(path, file, "mu_s", "sigma_s", count) if names & {"mu_s", "sigma_s"} else None
            features = _array(path, file, "features", 2) if "features" in names else None
    if gaussian is None and "arr_0" not in names:
        raise UserError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}: expected statistics (mu and sigma, or "
                        f"ref_mu and ref_sigma) or images (arr_0)")
    if features is not None and (gaussian is None or features.shape[1:] != gaussian.mean.shape):
        raise UserError(f"{path}: features has the shape {features.shape}, which does not go with the file's mean: "
                        f"make the file again")
    return Reference(gaussian, spatial, None if features is None else features.astype(np.float32),
                     NpzImages(path) if "arr_0" in names else None, meta.get("extractor"), meta.get("source", ""), path,
                     checksum)


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
    meta = {"format": FORMAT, "count": reference.gaussian.count, "source": reference.source,
            "extractor": reference.extractor}
    arrays: dict[str, Any] = {"mu": reference.gaussian.mean, "sigma": reference.gaussian.cov, "meta": json.dumps(meta)}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.cov}
    if reference.features is not None:
        arrays["features"] = reference.features
    write_npz(path, **arrays)
    with epath.Path(path).open("rb") as stored:
        checksum = hashlib.file_digest(stored, "sha256").hexdigest()
    return dataclasses.replace(reference, path=os.fspath(path), checksum=checksum, images=None)


def make_reference(batches: Iterable[Batch], total: int, extractor: FeatureExtractor, *, source: str = "",
                   keep_features: int = 10_000, seed: int = 0, hosts: Hosts | None = None) -> Reference:
    """Sends images through a network; every host calls it with its share of them, and all get the same.

    Args:
      batches: indices int (B,) and images uint8 (B, H, W, C); each index of [0, total) once over all hosts.
      total: N, at least 2.
      extractor: the network.
      source: see `Reference`.
      keep_features: of how many images, at most, the features are kept, in the order of their indices.
      seed: of their choice, which follows from it, `keep_features` and N alone.
      hosts: those that share the images.

    Raises:
      UserError: fewer than 2 images.
      ValueError: an image is missing or came twice, or one that the network does not take.
    """
    if total < 2:
        raise UserError(f"{total} images have no statistics: give at least 2")
    hosts = hosts or Hosts()
    moments, spatial = Moments(extractor.num_features), Moments(extractor.num_spatial)
    chosen = np.sort(np.random.RandomState(seed).permutation(total)[:keep_features])
    place_N = np.full(total, -1)
    place_N[chosen] = np.arange(len(chosen))
    kept_nxF = np.zeros((len(chosen), extractor.num_features), np.float32)
    times_N = np.zeros(total, np.int64)
    for indices_B, images in batches:
        found = extractor.extract(images)
        np.add.at(times_N, indices_B, 1)
        moments.add(found.features)
        if found.spatial is not None:
            spatial.add(found.spatial)
        places_B = place_N[indices_B]
        kept_nxF[places_B[places_B >= 0]] = found.features[places_B >= 0]
    times_N = hosts.sum(times_N)
    if (times_N != 1).any():
        raise ValueError(f"{(times_N != 1).sum()} of {total} images are missing or came more than once: give each "
                         f"image once")
    if hosts.count > 1:
        for start in range(0, len(kept_nxF), 1024):  # as float64 only in parts
            some = slice(start, start + 1024)
            kept_nxF[some] = hosts.sum(kept_nxF[some].astype(np.float64))
    return Reference(moments.merged(hosts).gaussian(),
                     spatial.merged(hosts).gaussian() if extractor.num_spatial else None,
                     kept_nxF if len(kept_nxF) else None,
                     extractor={"name": extractor.name, "checksum": extractor.checksum}, source=source)


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Turns what a missing or damaged file raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give an npz file of statistics or images") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as an npz file of statistics ({error}): give another one") from None


def _gaussian(path: str, file: Any, mean_key: str, cov_key: str, count: int) -> Gaussian:
    mean_F, cov_FxF = (np.asarray(_array(path, file, key, axes), np.float64)
                       for key, axes in ((mean_key, 1), (cov_key, 2)))
    if cov_FxF.shape != (len(mean_F), len(mean_F)):
        raise UserError(f"{path}: {cov_key} has the shape {cov_FxF.shape}, expected {(len(mean_F), len(mean_F))} to go "
                        f"with {mean_key}: make the file again")
    largest = np.abs(cov_FxF).max(initial=0.0)
    if np.abs(cov_FxF - cov_FxF.T).max(initial=0.0) > 1e-5 * largest or cov_FxF.diagonal().min(initial=0.0) < 0:
        raise UserError(f"{path}: {cov_key} is no covariance (not symmetric, or with negative variances): make the "
                        f"file again")
    return Gaussian(mean_F, cov_FxF, count)


def _array(path: str, file: Any, key: str, axes: int) -> np.ndarray:
    if key not in file.files:
        raise UserError(f"{path} has no {key}, which what it has ({', '.join(sorted(file.files))}) asks for: make the "
                        f"file again")
    try:
        array = file[key]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: {key} cannot be read ({error}): get the file again") from None
    if array.ndim != axes or array.dtype.kind != "f" or not array.size:
        raise UserError(f"{path}: {key} is {array.dtype} {array.shape}, expected floats with {axes} axes: make the "
                        f"file again")
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {key} holds values that are not finite: make the file again")
    return array


def _meta(path: str, stored: np.ndarray) -> dict[str, Any]:
    """What our own files say beside their arrays, checked for its types."""
    try:
        meta = json.loads(str(stored))
        network = meta["extractor"]
        fits = (meta["format"] == FORMAT and type(meta["count"]) is int and meta["count"] >= 0
                and isinstance(meta["source"], str)
                and (network is None or ({*network} == {"name", "checksum"}
                                         and all(isinstance(value, str) for value in network.values()))))
    except (ValueError, TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: meta is not that of format {FORMAT}: make the file with this version of marjax")
    return meta
