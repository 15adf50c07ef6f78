"""Figures of evaluations: what a setting does to quality and to speed, as in Figures 4 to 6 of the paper."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from marjax.plots import style
from marjax.plots.curves import Curve, curves, describe
from marjax.plots.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Settings that curves run along, and what they are called.
AXES = {"num_iter": "autoregressive steps", "num_sampling_steps": "diffusion steps", "cfg": "guidance scale",
        "temperature": "temperature"}
_COUNTS = ("num_iter", "num_sampling_steps")
_METRICS = {"fid": "FID", "inception_score": "Inception Score"}


def over(runs: Sequence[Run], along: str) -> "Figure | None":
    """FID and Inception Score over one of AXES, all else fixed."""
    drawn = {metric: [curve for run in runs for curve in curves(run.results, along, [metric])] for metric in _METRICS}
    drawn = {metric: found for metric, found in drawn.items() if found}
    if not drawn:
        return None
    figure = style.new_figure(3.2 * len(drawn), 2.6, f"Quality over {AXES[along]}")
    looks = _Looks(runs, list(drawn.values()))
    for axes, (metric, found) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        for curve in found:
            looks.draw(axes, curve, curve.x, curve.values(metric))
        axes.set(xlabel=AXES[along], ylabel=_name(metric, found))
        style.tick_points(axes, log=along in _COUNTS)
        style.log_if_wide(axes, "y")
    looks.legend(figure)
    return figure


def over_time(runs: Sequence[Run]) -> "Figure | None":
    """FID over seconds per image along autoregressive steps and along diffusion steps, which label the points."""
    drawn = {along: [curve for run in runs for curve in curves(run.results, along, ["fid", "seconds_per_image"])]
             for along in _COUNTS}
    drawn = {along: found for along, found in drawn.items() if found}
    if not drawn:
        return None
    figure = style.new_figure(3.6 * len(drawn), 3.0, "Quality over time")
    looks = _Looks(runs, list(drawn.values()))
    panels = figure.subplots(1, len(drawn), squeeze=False, sharey=True)[0]
    for axes, (along, found) in zip(panels, drawn.items(), strict=True):
        for curve in found:
            looks.draw(axes, curve, curve.values("seconds_per_image"), curve.values("fid"), [f"{x:g}" for x in curve.x])
        axes.set_title(f"points: {AXES[along]}", loc="left")
        axes.set_xlabel("seconds per image")
        style.log_if_wide(axes, "x")
        style.log_if_wide(axes, "y")
    panels[0].set_ylabel(_name("fid", [curve for found in drawn.values() for curve in found]))
    looks.legend(figure)
    return figure


def _name(metric: str, drawn: Sequence[Curve]) -> str:
    """What a metric is called: without Inception's features no distance is an FID."""
    inception = all(str(curve.fixed.get("extractor", "inception")).startswith("inception") for curve in drawn)
    return _METRICS[metric] if inception or metric != "fid" else "Frechet distance"


class _Looks:
    """How the curves of a figure are told apart: work directories by colour, curves of one by tint and marker."""

    def __init__(self, runs: Sequence[Run], panels: Sequence[Sequence[Curve]]) -> None:
        colors = dict(zip([run.name for run in runs], style.colors(len(runs)), strict=True))
        families = {curve.family: curve for found in panels for curve in found}
        self._common, labels = describe(list(families.values()))
        named = dict(zip(families, labels, strict=True))
        self._lines: dict[str, dict[str, Any]] = {}
        for found in panels:
            for name, color in colors.items():
                new = [curve.family for curve in found
                       if curve.fixed["workdir"] == name and curve.family not in self._lines]
                for i, (family, tint) in enumerate(zip(new, style.tints(color, len(new)), strict=True)):
                    self._lines[family] = {"color": tint, "label": named[family],
                                           "marker": style.MARKERS[i % len(style.MARKERS)]}

    def draw(self, axes: "Axes", curve: Curve, x: Sequence[float], y: Sequence[float],
             points: Sequence[str] = ()) -> None:
        """Draws a curve; `points` are written beside its points."""
        from matplotlib.patheffects import withStroke

        axes.plot(x, y, **self._lines[curve.family])
        for place, text in zip(zip(x, y, strict=True), points, strict=False):
            axes.annotate(text, place, (0, 5), textcoords="offset points", ha="center", fontsize=6, color=style.GREY,
                          path_effects=[withStroke(linewidth=1.5, foreground="white")])  # lines pass behind it

    def legend(self, figure: "Figure") -> None:
        """What tells curves apart, and what all have in common."""
        from matplotlib.lines import Line2D

        several = len(self._lines) > 1
        lines = list(self._lines.values()) if several else []
        style.legend(figure, [Line2D([], [], **line) for line in lines], [line["label"] for line in lines],
                     f"{'all: ' if several else ''}{self._common}")
