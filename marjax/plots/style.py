"""The style of figures, and reproducible figure files."""

import contextlib
import io
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

GREY = "#606060"
MARKERS = "osD^vPX*"
# The colour-blind safe palette of Okabe and Ito, without yellow and black.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "svg.hashsalt": "marjax",  # reproducible ids
}


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """Applies our style and restores the user's settings afterwards."""
    with contextlib.chdir("/"):  # its import reads the current folder's matplotlibrc
        import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    made = figure.suptitle(title, parse_math=False)
    figure.set_figheight(height + 0.17 * _wrap(made, 0.96 * figure.bbox.width, title))
    return figure


def fitted(figure: "Figure") -> "Figure":
    """Wraps titles and labels to the length of their axes."""
    written = []
    for axes in figure.axes:
        for text in (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label):  # type: ignore[attr-defined]
            written.append((axes, text, text.get_text(), text is axes.yaxis.label))
            text.set_text("")
    for _ in range(2):  # more lines shrink the axes
        figure.draw_without_rendering()
        for axes, text, whole, upright in written:
            room = axes.get_window_extent()
            height = room.height * (1.3 if axes.get_aspect() == "auto" else 1.0)  # the label may exceed the axes
            _wrap(text, height if upright else room.width, whole, upright)
    return figure


def _wrap(text: "Text", room: float, whole: str, upright: bool = False) -> int:
    """Wraps a text to `room` pixels, also inside words; returns the number of added lines."""
    text.set_text(whole)
    columns, minimum = len(whole), 8
    while columns > minimum:
        extent = text.get_window_extent()
        length = extent.height if upright else extent.width
        if length <= room:
            break
        columns = max(minimum, min(columns - 1, int(columns * room / length)))
        text.set_text(textwrap.fill(whole, columns, break_on_hyphens=False))
    return text.get_text().count("\n")


def error_bars(axes: "Axes", x: Any, y: Any, errors: Any, color: Any) -> None:
    """Draws bars of one standard deviation each way, none for NaN."""
    low, high = (np.asarray(y, float) + sign * np.asarray(errors, float) for sign in (-1.0, 1.0))
    axes.vlines(np.asarray(x, float), low, high, color=color, linewidth=0.8)


def render(figure: "Figure", formats: Sequence[str]) -> dict[str, bytes]:
    """The figure's files by format, without timestamps."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # one layout for all formats
    files = {}
    for each in formats:
        data = io.BytesIO()
        figure.savefig(data, format=each, metadata={"Date": None} if each == "svg" else None)
        files[each] = data.getvalue()
    return files


def colors(count: int) -> list[str]:
    """One colour per work directory."""
    import matplotlib
    from matplotlib.colors import to_hex

    if count <= len(_COLORS):
        return list(_COLORS[:count])
    return [to_hex(matplotlib.colormaps["viridis"](place)) for place in np.linspace(0.0, 0.9, count)]


def tints(color: str, count: int) -> list[str]:
    """Colours from `color` to a light tint of it."""
    from matplotlib.colors import to_hex, to_rgb

    return [to_hex(1.0 - (1.0 - np.array(to_rgb(color))) * share) for share in np.linspace(1.0, 0.45, count)]


def legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], title: str = "") -> None:
    """Adds a legend below the axes and enlarges the figure by it; the title wraps at commas."""
    width = figure.get_figwidth()
    labels = [_filled(figure, label, width - 0.6) for label in labels]
    columns = next((n for n in range(len(labels), 1, -1) if _width(figure, labels, n) < width), 1)
    title = _filled(figure, re.sub("(?<!,) ", "\N{NO-BREAK SPACE}", title), width - 0.2)
    split = np.array_split(np.array([label.count("\n") + 1 for label in labels], int), columns)
    lines = [column.tolist() for column in split]
    height = 0.15 * (len(title.splitlines()) + sum(map(max, itertools.zip_longest(*lines, fillvalue=0))))
    figure.set_figheight(figure.get_figheight() + height)
    # Labels are set afterwards, because Matplotlib omits those with a leading underscore.
    made = figure.legend(
        handles, ["-"] * len(labels), loc="outside lower left", ncols=columns, title=title or None, alignment="left"
    )
    for text, label in zip(made.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)
    made.get_title().set(color=GREY, parse_math=False)


def _width(figure: "Figure", labels: Sequence[str], columns: int) -> float:
    """The width of a legend in inches; Matplotlib fills columns first."""
    inches = np.array([_inches(figure, label) for label in labels])
    return sum(0.55 + max(column) for column in np.array_split(inches, columns)) + 0.1


def _inches(figure: "Figure", text: str) -> float:
    """The width of a legend's text in inches."""
    import matplotlib

    made = figure.text(0, 0, text, fontsize=matplotlib.rcParams["legend.fontsize"], parse_math=False)
    width = made.get_window_extent().width / figure.dpi
    made.remove()
    return float(width)


def _filled(figure: "Figure", text: str, width: float) -> str:
    """Wraps a legend's text to `width` inches."""
    columns, filled = len(text), text
    while columns > 8 and (inches := _inches(figure, filled)) > width:
        columns = max(8, min(columns - 1, int(columns * width / inches)))
        filled = textwrap.fill(text, columns, break_on_hyphens=False)
    return filled


def log_if_wide(axes: "Axes", which: Literal["x", "y"]) -> None:
    """Makes an axis logarithmic, with plain numbers, if its values are positive and span more than a factor of 5."""
    values = _drawn(axes, which)
    if values.min() > 0 and values.max() > 5 * values.min():
        _log(axes, which)


def tick_points(axes: "Axes", log: bool) -> None:
    """Puts the ticks of the horizontal axis at points, as far as there is room."""
    from matplotlib.ticker import FixedLocator, StrMethodFormatter

    if log:
        _log(axes, "x")
    values = np.unique(_drawn(axes, "x"))
    places = np.log(values) if log else values
    ticks = [0]
    for i, place in enumerate(places):
        if place - places[ticks[-1]] > (places[-1] - places[0]) / 12:
            ticks.append(i)
    axes.xaxis.set_major_locator(FixedLocator(values[ticks].tolist()))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def count_steps(axes: "Axes") -> None:
    """Formats the horizontal axis as training steps: 50k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _drawn(axes: "Axes", which: str) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(line, f"get_{which}data")(), float) for line in axes.get_lines()])


def _log(axes: "Axes", which: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
