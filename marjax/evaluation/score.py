"""All metrics of one set of images against dataset statistics, in one pass over the images.

What is kept of the images is sums. Features are kept only for what compares pairs of them, precision, recall and KID,
and then in files that all hosts see. Legend: N images, B of a batch, F features.
"""

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from etils import epath

from marjax import numerics, progress
from marjax.errors import UserError
from marjax.evaluation.across_processes import Processes
from marjax.evaluation.metrics import names
from marjax.evaluation.metrics.frechet import Moments, frechet_distance
from marjax.evaluation.metrics.inception_score import ScoreSums
from marjax.evaluation.metrics.kernel_distance import kernel_distance
from marjax.evaluation.metrics.precision_recall import precision_recall
from marjax.evaluation.networks.extractor import FeatureExtractor
from marjax.evaluation.statistics import DatasetStatistics
from marjax.files import write_bytes
from marjax.npz_file import read_npy

NEIGHBOURS = 3  # k of precision and recall
_SPLITS = 10  # of the Inception Score
_GROUP = 512  # images that an extractor gets at a time, at least: it waits for its devices at the end of each


class Features(Sequence[np.ndarray]):
    """Blocks of features, float32 (B, F), in files `features-<first index>.npy` of a folder that all hosts see."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = epath.Path(folder)
        self._paths: list[epath.Path] = []

    def add(self, first: int, features: np.ndarray) -> None:
        """Writes the block that begins with that image. Raises UserError."""
        data = io.BytesIO()
        np.save(data, features)
        write_bytes(self.folder / f"features-{first:09d}.npy", data.getvalue())

    def clear(self) -> None:
        """Deletes all blocks."""
        for path in self.folder.iterdir():
            if path.name.startswith("features-"):
                path.unlink()

    def list(self) -> None:
        """Makes the blocks of all hosts those of this sequence, in the order of the images."""
        self._paths = sorted(path for path in self.folder.iterdir() if path.name.startswith("features-"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return read_npy(self._paths[index], ("f", 2), advice="start again, which measures anew")


def check_fits(extractor: FeatureExtractor, statistics: DatasetStatistics, image_size: int, channels: int) -> None:
    """Checks before any work that images can be seen by the network and measured against the statistics.

    Raises:
      UserError: the statistics were made with another network, or the network takes other images.
    """
    made = statistics.extractor
    if made is not None and made != {"name": extractor.name, "checksum": extractor.checksum}:
        raise UserError(
            f"statistics {statistics.path} were made with {made['name']} (checksum {made['checksum'][:12]}), "
            f"but the extractor is {extractor.name} (checksum {extractor.checksum[:12]}): give that one, "
            f"or make the statistics again with marjax stats"
        )
    for gaussian, kind, number in (
        (statistics.gaussian, "features", extractor.num_features),
        (statistics.spatial, "spatial features", extractor.num_spatial),
    ):
        if gaussian is not None and number and len(gaussian.mean) != number:
            raise UserError(
                f"statistics {statistics.path} have {len(gaussian.mean)} {kind}, but {extractor.name} has "
                f"{number}: give another --statistics or --extractor"
            )
    try:
        extractor.extract(np.zeros((0, image_size, image_size, channels), np.uint8))
    except ValueError as error:
        raise UserError(
            f"{extractor.name} cannot see images of {image_size} pixels with {channels} channels "
            f"({error}): give another --extractor"
        ) from None


@numerics.pinned()
def score(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    total: int,
    extractor: FeatureExtractor,
    statistics: DatasetStatistics,
    processes: Processes = Processes(),  # noqa: B008
    *,
    num_classes: int = 0,
    features: Features | None = None,
) -> dict[str, float]:
    """Metrics by name; all hosts call this, each with its own images.

    `fid`; `sfid` where both sides have spatial features; `inception_score` and its `inception_score_std` over splits;
    `accuracy`, the share that the network takes for the class that was asked for; with `features`, against a
    statistics that has some, `precision`, `recall`, `kid` and `kid_std`. Features of another network give other names
    (see `names`).

    Args:
      batches: indices int (B,) in [0, total) and images uint8 (B, H, W, C); over all hosts each index once.
      total: N.
      extractor: which `check_fits` the statistics.
      statistics: of the real images.
      processes: that share the images out.
      num_classes: K, where image i was asked to be of class i mod K and the network has the same K classes.
      features: where to keep these; None for no comparison of pairs.

    Raises:
      UserError: a file cannot be written or read.
    """
    moments, spatial = Moments(extractor.num_features), Moments(extractor.num_spatial)
    sums = ScoreSums(total, extractor.num_classes, min(_SPLITS, total))
    real, made = statistics.features, features
    if real is None or made is None or min(len(real), total) <= NEIGHBOURS:  # too few to have such a neighbour
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
        metrics = _distances(moments, spatial, sums, extractor, statistics, processes)
        if asks:
            metrics["accuracy"] = float(processes.sum(np.array([right]))[0]) / total
        if real is not None and made is not None:
            made.list()
            pair = precision_recall([real], made, k=NEIGHBOURS, processes=processes)
            kid = kernel_distance(made, [real], processes=processes)  # in the order of torch-fidelity
            metrics |= {"precision": pair.precision, "recall": pair.recall, "kid": kid.mean, "kid_std": kid.std}
    return names.of_extractor(metrics, extractor.name)


def _distances(
    moments: Moments,
    spatial: Moments,
    sums: ScoreSums,
    extractor: FeatureExtractor,
    statistics: DatasetStatistics,
    processes: Processes,
) -> dict[str, float]:
    """The metrics that are made of sums; once a host has them, all have reached this and written their features."""
    metrics: dict[str, float] = {}
    if statistics.gaussian is not None:
        metrics["fid"] = frechet_distance(moments.merged(processes).gaussian(), statistics.gaussian)
    if statistics.spatial is not None and extractor.num_spatial:
        metrics["sfid"] = frechet_distance(spatial.merged(processes).gaussian(), statistics.spatial)
    mean, std = sums.merged(processes).result()
    return metrics | {"inception_score": mean, "inception_score_std": std}


def _grouped(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same images, at least _GROUP at a time but for the last."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in itertools.chain(batches, [None]):
        held += [] if batch is None else [batch]
        if held and (batch is None or sum(len(indices) for indices, _ in held) >= _GROUP):
            yield np.concatenate([indices for indices, _ in held]), np.concatenate([images for _, images in held])
            held = []
