"""What metrics are called. FID, Inception Score and KID are those of Inception's features only.

The same measures of another network's features carry its name, as in TF-GAN: `frechet_classifier_distance`.
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
    """Metrics by the names that they have with this extractor's features.

    Args:
      metrics: by the names that they have with Inception's; other names stay, and so do those given by this function.
      extractor: name of the network.
    """
    if extractor == "inception":
        return dict(metrics)
    network = re.sub(r"\W+", "_", extractor)[:40] or "unknown"
    return {_OF_INCEPTION.get(name, name).format(network): value for name, value in metrics.items()}


def is_distance(metric: str) -> bool:
    """Whether it is a Frechet distance of features, FID or another."""
    return _DISTANCE.fullmatch(metric) is not None


def is_score(metric: str) -> bool:
    """Whether it is the Inception Score, or that of another network."""
    return _SCORE.fullmatch(metric) is not None


def title(metric: str) -> str:
    """What figures call a distance or a score."""
    if metric in _TITLES:
        return _TITLES[metric]
    distance, score = _DISTANCE.fullmatch(metric), _SCORE.fullmatch(metric)
    if distance is not None:
        return f"Frechet distance ({distance[1]})"
    return metric if score is None else f"{score[1]} score"
