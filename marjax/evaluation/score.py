"""All metrics of a set of images against dataset statistics, in one pass over the images.

Only sums are kept, and for precision, recall and KID, which compare pairs of images, features in files that all
processes see. Legend: N images, B in a batch, F features.
"""

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from etils import epath

from marjax import numerics, progress
from marjax.errors import UserError
from marjax.evaluation.across_processes import ALONE, Processes
from marjax.evaluation.metrics import names
from marjax.evaluation.metrics.frechet import Moments, frechet_distance
from marjax.evaluation.metrics.inception_score import ScoreSums
from marjax.evaluation.metrics.kernel_distance import kernel_distance
from marjax.evaluation.metrics.precision_recall import precision_recall
from marjax.evaluation.networks.extractor import FeatureExtractor, identity
from marjax.evaluation.statistics import DatasetStatistics
from marjax.files import write_bytes
from marjax.npz_file import read_npy

NEIGHBOURS = 3  # k of precision and recall
_SPLITS = 10  # of the Inception Score
_GROUP = 512  # images per call of an extractor, at least: each call ends by waiting for the devices


class Features(Sequence[np.ndarray]):
    """Blocks of features, float32 (B, F), in files `features-<first index>.npy` of a folder that all processes see."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = epath.Path(folder)
        self._paths: list[epath.Path] = []

    def add(self, first: int, features: np.ndarray) -> None:
        """Writes the block whose first image has this index. Raises UserError."""
        data = io.BytesIO()
        np.save(data, features)
        write_bytes(self.folder / f"features-{first:09d}.npy", data.getvalue())

    def clear(self) -> None:
        """Deletes all blocks."""
        self.list()
        for path in self._paths:
            path.unlink()

    def list(self) -> None:
        """Fills this sequence with the blocks of all processes, in the order of the images."""
        self._paths = sorted(path for path in self.folder.iterdir() if path.name.startswith("features-"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return read_npy(self._paths[index], ("f", 2), advice="start again")


def check_fits(extractor: FeatureExtractor, statistics: DatasetStatistics, image_size: int, channels: int) -> None:
    """Checks that the network takes these images and made the statistics. Raises UserError."""
    made = statistics.extractor
    if made is not None and made != identity(extractor):
        raise UserError(
            f"statistics {statistics.path} were made with {made['name']} (checksum {made['checksum'][:12]}), "
            f"but the extractor is {extractor.name} (checksum {extractor.checksum[:12]}); use that extractor "
            f"or make the statistics again with marjax stats"
        )
    for gaussian, kind, number in (
        (statistics.gaussian, "features", extractor.num_features),
        (statistics.spatial, "spatial features", extractor.num_spatial),
    ):
        if gaussian is not None and number and len(gaussian.mean) != number:
            raise UserError(
                f"statistics {statistics.path} have {len(gaussian.mean)} {kind}, but {extractor.name} has "
                f"{number}; give another --statistics or --extractor"
            )
    try:
        extractor.extract(np.zeros((0, image_size, image_size, channels), np.uint8))
    except ValueError as error:
        raise UserError(
            f"extractor {extractor.name} does not take images of {image_size} pixels with {channels} channels "
            f"({error}); give another --extractor"
        ) from None


@numerics.pinned()
def score(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    total: int,
    extractor: FeatureExtractor,
    statistics: DatasetStatistics,
    processes: Processes = ALONE,
    *,
    num_classes: int = 0,
    features: Features | None = None,
) -> dict[str, float]:
    """Computes the metrics; every process calls this with its share of the images.

    Args:
      batches: indices int (B,) in [0, total) and images uint8 (B, H, W, C); over all processes each index once.
      total: N.
      extractor: passes `check_fits` with the statistics.
      statistics: of the real images.
      processes: those that share the images.
      num_classes: K, if image i was sampled with class i mod K and the network has the same K classes.
      features: where to keep features; None skips precision, recall and KID.

    Returns:
      `fid`; `sfid` if both sides have spatial features; `inception_score` and `inception_score_std` (over splits);
      `accuracy`, the share classified as the class it was sampled with; if both sides have features, `precision`,
      `recall`, `kid` and `kid_std`. With another network than Inception some names differ: see `names`.

    Raises:
      UserError: a file cannot be written or read.
    """
    moments, spatial = Moments(extractor.num_features), Moments(extractor.num_spatial)
    sums = ScoreSums(total, extractor.num_classes, min(_SPLITS, total))
    real, made = statistics.features, features
    if real is None or made is None or min(len(real), total) <= NEIGHBOURS:
        real = made = None
    asks = num_classes == extractor.num_classes
    right = 0
    with progress.bar("measuring", -(-total // processes.count), "images") as bar:
        for indices, images in _grouped(batches):
            found = extractor.extract(images)
            moments.add(found.features)
            sums.add(indices, found.logits)
            if found.spatial is not None and statistics.spatial is not None:
                spatial.add(found.spatial)
            if asks:
                right += int((found.logits.argmax(axis=1) == indices % num_classes).sum())
            if made is not None:
                made.add(int(indices[0]), found.features)
            bar.update(len(images))
    with progress.activity("computing the metrics"):
        metrics: dict[str, float] = {}
        if statistics.gaussian is not None:
            metrics["fid"] = frechet_distance(moments.merged(processes).gaussian(), statistics.gaussian)
        if statistics.spatial is not None and extractor.num_spatial:
            metrics["sfid"] = frechet_distance(spatial.merged(processes).gaussian(), statistics.spatial)
        metrics["inception_score"], metrics["inception_score_std"] = sums.merged(processes).result()
        if asks:
            metrics["accuracy"] = float(processes.sum(np.array([right]))[0]) / total
        if real is not None and made is not None:
            made.list()  # complete: the merges above have waited for all processes
            pair = precision_recall([real], made, k=NEIGHBOURS, processes=processes)
            kid = kernel_distance(made, [real], processes=processes)  # the order of torch-fidelity
            metrics |= {"precision": pair.precision, "recall": pair.recall, "kid": kid.mean, "kid_std": kid.std}
    return names.of_extractor(metrics, extractor.name)


def _grouped(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Joins batches to at least _GROUP images, except the last."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in itertools.chain(batches, [None]):
        held += [] if batch is None else [batch]
        if held and (batch is None or sum(len(indices) for indices, _ in held) >= _GROUP):
            yield np.concatenate([indices for indices, _ in held]), np.concatenate([images for _, images in held])
            held = []
