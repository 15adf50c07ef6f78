"""How figures look, and figures as files that are the same byte for byte."""

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
# Okabe and Ito's colours, which colour-blind readers tell apart, without yellow and black.
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
    "svg.hashsalt": "marjax",
}  # or else the ids in an SVG file are drawn anew every time


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """Our look, whatever the user's own settings; these are back afterwards."""
    with contextlib.chdir("/"):  # when it is imported, it reads the current folder's matplotlibrc
        import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    made = figure.suptitle(title, parse_math=False)
    figure.set_figheight(height + 0.17 * _wrap(made, 0.96 * figure.bbox.width, title))
    return figure


def fitted(figure: "Figure") -> "Figure":
    """The same figure, with what is written along the axes broken into lines that are no longer than these."""
    written = []
    for axes in figure.axes:
        for text in (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label):  # type: ignore[attr-defined]
            written.append((axes, text, text.get_text(), text is axes.yaxis.label))
            text.set_text("")
    for _ in range(2):  # lines that are added leave the axes less room
        figure.draw_without_rendering()
        for axes, text, whole, upright in written:
            room = axes.get_window_extent()
            height = room.height * (1.3 if axes.get_aspect() == "auto" else 1.0)  # ticks and titles leave some
            _wrap(text, height if upright else room.width, whole, upright)
    return figure


def _wrap(text: "Text", room: float, whole: str, upright: bool = False) -> int:
    """Sets a text in lines of at most so many pixels, broken also inside words; how many lines this adds."""
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
    """Vertical bars of one standard deviation each way; none where that is nan."""
    low, high = (np.asarray(y, float) + sign * np.asarray(errors, float) for sign in (-1.0, 1.0))
    axes.vlines(np.asarray(x, float), low, high, color=color, linewidth=0.8)


def render(figure: "Figure", formats: Sequence[str]) -> dict[str, bytes]:
    """The figure's files by format, without the time of writing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once: else every format would move things by a hair
    files = {}
    for each in formats:
        data = io.BytesIO()
        figure.savefig(data, format=each, metadata={"Date": None} if each == "svg" else None)
        files[each] = data.getvalue()
    return files


def colors(count: int) -> list[str]:
    """One a work directory."""
    import matplotlib
    from matplotlib.colors import to_hex

    if count <= len(_COLORS):
        return list(_COLORS[:count])
    return [to_hex(matplotlib.colormaps["viridis"](place)) for place in np.linspace(0.0, 0.9, count)]


def tints(color: str, count: int) -> list[str]:
    """From a colour to a light form of it."""
    from matplotlib.colors import to_hex, to_rgb

    return [to_hex(1.0 - (1.0 - np.array(to_rgb(color))) * share) for share in np.linspace(1.0, 0.45, count)]


def legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], title: str = "") -> None:
    """Below the axes, in as many columns as fit; the figure grows by it. The title is broken into lines at commas."""
    width = figure.get_figwidth()
    labels = [_filled(figure, label, width - 0.6) for label in labels]
    columns = next((n for n in range(len(labels), 1, -1) if _width(figure, labels, n) < width), 1)
    title = _filled(figure, re.sub("(?<!,) ", "\N{NO-BREAK SPACE}", title), width - 0.2)
    split = np.array_split(np.array([label.count("\n") + 1 for label in labels], int), columns)
    lines = [column.tolist() for column in split]
    height = 0.15 * (len(title.splitlines()) + sum(map(max, itertools.zip_longest(*lines, fillvalue=0))))
    figure.set_figheight(figure.get_figheight() + height)
    # Labels are set afterwards, because Matplotlib leaves out those that begin with an underscore.
    made = figure.legend(
        handles, ["-"] * len(labels), loc="outside lower left", ncols=columns, title=title or None, alignment="left"
    )
    for text, label in zip(made.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)
    made.get_title().set(color=GREY, parse_math=False)


def _width(figure: "Figure", labels: Sequence[str], columns: int) -> float:
    """The width of a legend, in inches; Matplotlib fills it column by column."""
    inches = np.array([_inches(figure, label) for label in labels])
    return sum(0.55 + max(column) for column in np.array_split(inches, columns)) + 0.1


def _inches(figure: "Figure", text: str) -> float:
    """The width of a text of a legend."""
    import matplotlib

    made = figure.text(0, 0, text, fontsize=matplotlib.rcParams["legend.fontsize"], parse_math=False)
    width = made.get_window_extent().width / figure.dpi
    made.remove()
    return float(width)


def _filled(figure: "Figure", text: str, width: float) -> str:
    """A text of a legend in lines of at most so many inches."""
    columns, filled = len(text), text
    while columns > 8 and (inches := _inches(figure, filled)) > width:
        columns = max(8, min(columns - 1, int(columns * width / inches)))
        filled = textwrap.fill(text, columns, break_on_hyphens=False)
    return filled


def log_if_wide(axes: "Axes", which: Literal["x", "y"]) -> None:
    """A logarithmic axis, with plain numbers, if what is drawn is positive and spans more than a factor of 5."""
    values = _drawn(axes, which)
    if values.min() > 0 and values.max() > 5 * values.min():
        _log(axes, which)


def tick_points(axes: "Axes", log: bool) -> None:
    """A horizontal axis, logarithmic or not, with ticks where points are, as far as there is room for them."""
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
    """The horizontal axis counts training steps: 50k."""
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
