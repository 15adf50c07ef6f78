"""Figures of evaluations: the effect of a setting on quality and speed, as in Figures 4 to 6 of the paper.

Every kind of distance and score has its own panels, because those of different networks are not comparable.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from marjax.evaluation.metrics import names
from marjax.plots import style
from marjax.plots.curves import Curve, curves, describe
from marjax.plots.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The settings of the horizontal axes, with their titles.
AXES = {
    "num_iter": "autoregressive steps",
    "num_sampling_steps": "diffusion steps",
    "cfg": "guidance scale",
    "temperature": "temperature",
}
_COUNTS = ("num_iter", "num_sampling_steps")


def over(runs: Sequence[Run], along: str) -> "Figure | None":
    """FID and Inception Score, or another network's, over one of AXES, with all else fixed."""
    drawn = {
        metric: [curve for run in runs for curve in curves(run.results, along, [metric])]
        for metric in (*_metrics(runs, names.is_distance), *_metrics(runs, names.is_score))
    }
    drawn = {metric: found for metric, found in drawn.items() if found}
    if not drawn:
        return None
    figure = style.new_figure(3.2 * len(drawn), 2.6, f"Quality over {AXES[along]}")
    looks = _Looks(runs, list(drawn.values()))
    for axes, (metric, found) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        for curve in found:
            looks.draw(axes, curve, curve.x, metric)
        axes.set(xlabel=AXES[along], ylabel=names.title(metric))
        style.tick_points(axes, log=along in _COUNTS)
        style.log_if_wide(axes, "y")
    looks.legend(figure)
    return style.fitted(figure)


def over_time(runs: Sequence[Run]) -> "Figure | None":
    """FID, or another distance, over seconds per image for both kinds of steps, which label the points."""
    drawn = {
        (metric, along): [curve for run in runs for curve in curves(run.results, along, [metric, "seconds_per_image"])]
        for metric in _metrics(runs, names.is_distance)
        for along in _COUNTS
    }
    drawn = {key: found for key, found in drawn.items() if found}
    if not drawn:
        return None
    figure = style.new_figure(3.6 * len(drawn), 3.0, "Quality over time")
    looks = _Looks(runs, list(drawn.values()))
    first: dict[str, Axes] = {}  # panels of a metric share its axis
    for i, ((metric, along), found) in enumerate(drawn.items()):
        axes = figure.add_subplot(1, len(drawn), i + 1, sharey=first.get(metric))
        for curve in found:
            looks.draw(axes, curve, curve.values("seconds_per_image"), metric, [f"{x:g}" for x in curve.x])
        axes.set_title(f"points: {AXES[along]}", loc="left")
        axes.set_xlabel("seconds per image")
        if first.setdefault(metric, axes) is axes:
            axes.set_ylabel(names.title(metric))
        else:
            axes.tick_params(labelleft=False)
        style.log_if_wide(axes, "x")
        style.log_if_wide(axes, "y")
    looks.legend(figure)
    return style.fitted(figure)


def _metrics(runs: Sequence[Run], is_kind: Callable[[str], bool]) -> list[str]:
    """The metrics of a kind in any result."""
    return list(
        dict.fromkeys(name for run in runs for result in run.results for name in result.metrics if is_kind(name))
    )


class _Looks:
    """The style of a figure's curves: colours for work directories, tints and markers for their curves."""

    def __init__(self, runs: Sequence[Run], panels: Sequence[Sequence[Curve]]) -> None:
        colors = dict(zip([run.name for run in runs], style.colors(len(runs)), strict=True))
        families = {curve.family: curve for found in panels for curve in found}
        self._common, labels = describe(list(families.values()))
        named = dict(zip(families, labels, strict=True))
        self._lines: dict[str, dict[str, Any]] = {}
        self._bars: dict[str, None] = {}  # what the standard deviations are over
        for name, color in colors.items():
            mine = [family for family, curve in families.items() if curve.fixed["workdir"] == name]
            for i, (family, tint) in enumerate(zip(mine, style.tints(color, len(mine)), strict=True)):
                self._lines[family] = {
                    "color": tint,
                    "label": named[family],
                    "marker": style.MARKERS[i % len(style.MARKERS)],
                }

    def draw(self, axes: "Axes", curve: Curve, x: Sequence[float], metric: str, points: Sequence[str] = ()) -> None:
        """Draws a curve with its error bars, and the texts `points` beside its points."""
        from matplotlib.patheffects import withStroke

        y, (errors, source) = curve.values(metric), curve.errors(metric)
        axes.plot(x, y, **self._lines[curve.family])
        if source:
            self._bars[source] = None
            style.error_bars(axes, x, y, errors, self._lines[curve.family]["color"])
        for place, text in zip(zip(x, y, strict=True), points, strict=False):
            axes.annotate(
                text,
                place,
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=6,
                color=style.GREY,
                path_effects=[withStroke(linewidth=1.5, foreground="white")],  # separates it from lines
            )

    def legend(self, figure: "Figure") -> None:
        """Adds what distinguishes the curves, and what they share."""
        from matplotlib.lines import Line2D

        several = len(self._lines) > 1
        lines = list(self._lines.values()) if several else []
        bars = f", bars: standard deviation over {' and over '.join(self._bars)}" if self._bars else ""
        style.legend(
            figure,
            [Line2D([], [], **line) for line in lines],
            [line["label"] for line in lines],
            f"{'all: ' if several else ''}{self._common}{bars}",
        )
