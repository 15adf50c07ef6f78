"""Names of metrics. FID, Inception Score and KID require Inception's features.

With another network's features, names contain the network, as in TF-GAN: `frechet_classifier_distance`.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_OF_INCEPTION = {
    "fid": "frechet_{}_distance",
    "sfid": "spatial_frechet_{}_distance",
    "kid": "kernel_{}_distance",
    "kid_std": "kernel_{}_distance_std",
    "inception_score": "{}_score",
    "inception_score_std": "{}_score_std",
}
_DISTANCE, _SCORE = re.compile(r"fid|frechet_(\w+)_distance"), re.compile(r"(\w+)_score")
_TITLES = {"fid": "FID", "inception_score": "Inception Score"}


def of_extractor(metrics: Mapping[str, Value], extractor: str) -> dict[str, Value]:
    """Renames metrics for an extractor.

    Args:
      metrics: by their names for Inception; other names, and those already renamed, are kept.
      extractor: name of the network.
    """
    if extractor == "inception":
        return dict(metrics)
    network = re.sub(r"\W+", "_", extractor)[:40] or "unknown"
    return {_OF_INCEPTION.get(name, name).format(network): value for name, value in metrics.items()}


def is_distance(metric: str) -> bool:
    """Whether a metric is a Frechet distance, FID or another network's."""
    return _DISTANCE.fullmatch(metric) is not None


def is_score(metric: str) -> bool:
    """Whether a metric is the Inception Score or another network's."""
    return _SCORE.fullmatch(metric) is not None


def title(metric: str) -> str:
    """The title of a distance or score in figures."""
    if metric in _TITLES:
        return _TITLES[metric]
    distance, score = _DISTANCE.fullmatch(metric), _SCORE.fullmatch(metric)
    if distance is not None:
        return f"Frechet distance ({distance[1]})"
    return metric if score is None else f"{score[1]} score"
