"""Results of evaluations as curves: one setting varies along a curve, all others are held fixed."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Result(NamedTuple):
    """One evaluation.

    Attributes:
      settings: all that it depends on, by name, as JSON has it.
      metrics: what was measured, `seconds_per_image` among it.
    """

    settings: dict[str, Any]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Results that differ in one setting.

    Attributes:
      fixed: the other settings.
      x: values of that setting, increasing.
      repeats: the results of a value, one a seed.
    """

    fixed: dict[str, Any]
    x: Sequence[float]
    repeats: Sequence[Sequence[Result]]

    @property
    def family(self) -> str:
        """`fixed` as a key."""
        return json.dumps(self.fixed, sort_keys=True)

    def values(self, metric: str) -> list[float]:
        """Means over the seeds, of a metric that all results have."""
        return [statistics.fmean(each.metrics[metric] for each in point) for point in self.repeats]

    def errors(self, metric: str) -> tuple[list[float], str]:
        """Standard deviations, nan where there is none, and of what they are; "" for nothing.

        They are over seeds where there are several, else over the splits that a score is the mean of.
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
        """Whether any point was measured with several seeds."""
        return any(len(point) > 1 for point in self.repeats)


def curves(results: Sequence[Result], along: str, needed: Sequence[str]) -> list[Curve]:
    """The curves of at least two points along a setting, in order of their other settings.

    "ddim25" counts as 25 diffusion steps, but such steps are spaced in another way: `fixed["spacing"]`, "ddim" or
    "even", keeps them apart from 25 where `along` is "num_sampling_steps". Results that differ in their seed alone are
    repeats of one point; of two with the same settings the later counts.

    Args:
      results: of any settings.
      along: the name of a setting with numbers.
      needed: metrics without which a result is left out.
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
    """Those without guidance once for each of its schedules: all of them begin there."""
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
    """The value of a setting and all others; None if it has no number there."""
    value, fixed = settings.get(along), {key: other for key, other in settings.items() if key != along}
    if along == "num_sampling_steps":
        digits = str(value).removeprefix("ddim")
        fixed["spacing"] = "ddim" if digits != str(value) else "even"
        value = int(digits) if digits.isdecimal() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value, fixed


def _rank(value: Any) -> tuple[float, str]:
    """Numbers, also those in strings, by size and before words."""
    digits = str(value).removeprefix("ddim")
    return (float(digits) if digits.replace(".", "", 1).isdecimal() else math.inf), str(value)


def describe(drawn: Sequence[Curve]) -> tuple[str, list[str]]:
    """What all curves have in common, and what tells each from the others, in words; "" for nothing."""
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
