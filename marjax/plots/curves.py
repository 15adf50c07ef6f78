"""Evaluation results as curves along one setting, with all others fixed."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Result(NamedTuple):
    """One evaluation.

    Attributes:
      settings: everything it depends on, by name, as in JSON.
      metrics: by name, with `seconds_per_image`.
    """

    settings: dict[str, Any]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Results that differ in one setting.

    Attributes:
      fixed: the other settings.
      x: values of the setting, increasing.
      repeats: the results for each value, one per seed.
    """

    fixed: dict[str, Any]
    x: Sequence[float]
    repeats: Sequence[Sequence[Result]]

    @property
    def family(self) -> str:
        """`fixed` as a key."""
        return json.dumps(self.fixed, sort_keys=True)

    def values(self, metric: str) -> list[float]:
        """Means over the seeds of a metric that all results have."""
        return [statistics.fmean(each.metrics[metric] for each in point) for point in self.repeats]

    def errors(self, metric: str) -> tuple[list[float], str]:
        """Standard deviations, NaN if unknown, and what they are over; "" if all are unknown.

        They are over seeds if there are several, else over the splits of a score.
        """
        if self.has_seeds:
            return [
                statistics.stdev([each.metrics[metric] for each in point]) if len(point) > 1 else math.nan
                for point in self.repeats
            ], "seeds"
        spread = [point[0].metrics.get(f"{metric}_std", math.nan) for point in self.repeats]
        return spread, "" if all(map(math.isnan, spread)) else "splits of the images"

    @property
    def has_seeds(self) -> bool:
        """Whether any point has several seeds."""
        return any(len(point) > 1 for point in self.repeats)


def curves(results: Sequence[Result], along: str, needed: Sequence[str]) -> list[Curve]:
    """Groups results into curves of at least two points along a setting, ordered by their other settings.

    Along "num_sampling_steps", "ddim25" counts as 25 steps, but `fixed["spacing"]`, "ddim" or "even", separates it from
    25. Results that differ only in their seed are repeats of one point; of two with equal settings the later counts.

    Args:
      results: with any settings.
      along: the name of a numeric setting.
      needed: the metrics that a result must have.
    """
    groups: dict[str, tuple[dict[str, Any], dict[float, dict[Any, Result]]]] = {}
    for result in _for_every_schedule(results) if along == "cfg" else results:
        split = _split(result.settings, along)
        if split is not None and all(metric in result.metrics for metric in needed):
            x, fixed = split
            shared = {key: value for key, value in fixed.items() if key != "seed"}
            points = groups.setdefault(json.dumps(shared, sort_keys=True), (fixed, {}))[1]
            points.setdefault(x, {})[fixed.get("seed")] = result
    found = []
    for fixed, points in groups.values():
        if len(points) > 1:
            seeds = {seed for point in points.values() for seed in point}
            if len(seeds) > 1:
                fixed = {key: f"{len(seeds)} seeds" if key == "seed" else value for key, value in fixed.items()}
            found.append(Curve(fixed, sorted(points), [list(points[x].values()) for x in sorted(points)]))
    return sorted(found, key=lambda curve: [_rank(value) for value in curve.fixed.values()])


def _for_every_schedule(results: Sequence[Result]) -> list[Result]:
    """Repeats results without guidance for each cfg_schedule, because all of these curves start there."""
    schedules = {result.settings["cfg_schedule"]: None for result in results if "cfg_schedule" in result.settings}
    return [
        each
        for result in results
        for each in (
            [result._replace(settings={**result.settings, "cfg_schedule": schedule}) for schedule in schedules]
            if schedules and result.settings.get("cfg") == 1.0
            else [result]
        )
    ]


def _split(settings: dict[str, Any], along: str) -> tuple[float, dict[str, Any]] | None:
    """The value of a setting and all other settings; None if it is not a number."""
    value, fixed = settings.get(along), {key: other for key, other in settings.items() if key != along}
    if along == "num_sampling_steps":
        digits = str(value).removeprefix("ddim")
        fixed["spacing"] = "ddim" if digits != str(value) else "even"
        value = int(digits) if digits.isdecimal() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value, fixed


def _rank(value: Any) -> tuple[float, str]:
    """A sort key: numbers, also in strings, before words."""
    digits = str(value).removeprefix("ddim")
    return (float(digits) if digits.replace(".", "", 1).isdecimal() else math.inf), str(value)


def describe(drawn: Sequence[Curve]) -> tuple[str, list[str]]:
    """The settings that all curves share, and those that distinguish each, in words; "" for none."""
    keys = dict.fromkeys(key for curve in drawn for key in curve.fixed)
    differing = {key for key in keys if len({json.dumps(curve.fixed.get(key)) for curve in drawn}) > 1}

    def words(curve: Curve, chosen: Sequence[str], absent: bool = False) -> str:
        return ", ".join(
            _phrase(key, curve.fixed.get(key)) for key in chosen if absent or curve.fixed.get(key) is not None
        )

    own = [key for key in keys if key in differing]
    labels = [words(curve, own) for curve in drawn]
    labels = [
        words(curve, own, absent=len(drawn) > 1 and (not label or labels.count(label) > 1))
        for curve, label in zip(drawn, labels, strict=True)
    ]
    return words(drawn[0], [key for key in keys if key not in differing]) if drawn else "", labels


def _phrase(key: str, value: Any) -> str:
    phrases = {
        "workdir": "{}",
        "weights": "{} weights",
        "cfg_schedule": "{} schedule",
        "spacing": "{} spacing",
        "num_images": "{:,} images",
        "statistics": "against {}",
        "extractor": "features of {}",
    }
    if value is None or isinstance(value, bool):
        return key if value else f"no {key}"
    if key == "seed" and isinstance(value, str):
        return f"mean of {value}"
    if isinstance(value, float):
        return f"{key} {value:g}"
    return phrases.get(key, f"{key} {{}}").format(value)
