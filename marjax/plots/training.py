"""Figures of training: loss, evaluations and samples."""

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from marjax.errors import StorageError, UserError
from marjax.evaluation.metrics import names
from marjax.files import read_whole
from marjax.plots import style
from marjax.plots.runs import GUIDED, NUM_IMAGES, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_LOSSES = ("train/grad_norm", "train/param_norm", "train/lr")
_TITLES = {
    "mse": "squared error",
    "vb": "variational bound, bits",
    **{f"loss_t_quarter{i}": f"loss, t in quarter {i} of 4" for i in range(1, 5)},
}
_GUIDANCE: dict[str, tuple[Any, str]] = {"": ("-", "without guidance"), GUIDED: ("--", "with guidance")}
_STEPS_SHOWN = 6  # of samples
_MAX_BYTES, _MAX_PIXELS = 1 << 28, 1 << 26
_GAP = 16  # pixels between the halves of a picture, as in `images.beside`


def loss(runs: Sequence[Run]) -> "Figure | None":
    """The loss, large, and its parts over steps: as logged, faint, and smoothed."""
    from matplotlib.lines import Line2D

    drawn = _with_any(runs, ["train/loss"])
    if not drawn:
        return None
    names = dict.fromkeys(name for run, _ in drawn for line in run.lines for name in line)
    parts = [
        name
        for name in names
        if name.startswith("train/")
        and name not in ("train/loss", *_NO_LOSSES)
        and any(len(run.series(name)[0]) for run, _ in drawn)
    ]
    rows = 1 if len(parts) < 2 else 2 if len(parts) <= 8 else 3
    columns = -(-len(parts) // rows)
    figure = style.new_figure(3.4 + 1.8 * columns, 2.8 if rows < 3 else 3.8, _title("Training loss", drawn))
    places = figure.add_gridspec(rows, 1 + columns, width_ratios=[3.4] + [1.8] * columns)
    panels = [places[:, 0]] + [places[i // columns, 1 + i % columns] for i in range(len(parts))]
    for i, (place, metric) in enumerate(zip(panels, ["train/loss", *parts], strict=True)):
        axes = figure.add_subplot(place)
        for run, color in drawn:
            steps, values = run.series(metric)
            smooth = smoothed(values)
            if smooth is not values:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
            axes.plot(steps, smooth, color=color)
        name = metric.removeprefix("train/")
        axes.set_title(_TITLES.get(name, name), loc="left")
        if not i or i > len(parts) - columns:  # the lowest of a column
            axes.set_xlabel("step")
        style.log_if_wide(axes, "y")
        style.count_steps(axes)
    if len(drawn) > 1:
        style.legend(figure, [Line2D([], [], color=color) for _, color in drawn], [run.name for run, _ in drawn])
    return style.fitted(figure)


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred weighted mean over a twentieth of the values, (N,); few values are returned unchanged."""
    half = len(values) // 40
    if not half:
        return values
    window = np.hanning(2 * half + 3)[1:-1]
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def evaluations(runs: Sequence[Run]) -> "Figure | None":
    """FID and Inception Score, or another network's, over steps, without (solid) and with guidance (dashed)."""
    from matplotlib.lines import Line2D

    found = dict.fromkeys(
        name.removeprefix("eval/").removesuffix(GUIDED)
        for run in runs
        for line in run.lines
        for name in line
        if name.startswith("eval/")
    )
    metrics = [f"eval/{name}" for is_kind in (names.is_distance, names.is_score) for name in found if is_kind(name)]
    metrics = [metric for metric in metrics if _with_any(runs, [metric + kind for kind in _GUIDANCE])]
    drawn = _with_any(runs, [metric + kind for metric in metrics for kind in _GUIDANCE])
    if not drawn:
        return None
    kinds = [kind for kind in _GUIDANCE if _with_any(runs, [metric + kind for metric in metrics])]
    figure = style.new_figure(3.2 * len(metrics), 2.6, _title("Evaluations during training", drawn))
    bars = False
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for run, color in drawn:
            for kind in kinds:
                steps, values = run.series(metric + kind)
                axes.plot(steps, values, linestyle=_GUIDANCE[kind][0], color=color, marker="o")
                spread = dict(zip(*run.series(f"{metric}_std{kind}"), strict=True))
                if spread:
                    bars = True
                    style.error_bars(axes, steps, values, [spread.get(step, math.nan) for step in steps], color)
        axes.set(xlabel="step", ylabel=names.title(metric.removeprefix("eval/")))
        style.log_if_wide(axes, "y")
        style.count_steps(axes)
    lines = [Line2D([], [], color=color) for _, color in drawn] if len(drawn) > 1 else []
    lines += [Line2D([], [], color=style.GREY, linestyle=_GUIDANCE[kind][0]) for kind in kinds]
    counts = [_num_images(run) for run, _ in drawn]
    same = len(set(counts)) == 1
    labels = (
        [
            run.name + ("" if same else f" ({count or 'number of images not known'})")
            for (run, _), count in zip(drawn, counts, strict=True)
        ]
        if len(drawn) > 1
        else []
    )
    common = [f"{counts[0]} a point"] if same and counts[0] else []
    common += ["bars: standard deviation over splits of the images"] if bars else []
    style.legend(figure, lines, labels + [_GUIDANCE[kind][1] for kind in kinds], ", ".join(common))
    return style.fitted(figure)


def _num_images(run: Run) -> str:
    """The number of images per evaluation during training, in words; "" if unknown."""
    counts = sorted({int(count) for count in run.series(NUM_IMAGES)[1]})
    ends = dict.fromkeys((counts[0], counts[-1])) if counts else {}
    return f"{' to '.join(f'{count:,}' for count in ends)} images" if ends else ""


def samples(runs: Sequence[Run]) -> "Figure | None":
    """Samples of EMA weights at up to six steps, with the first and the last; one row per work directory."""
    drawn = [run for run in runs if run.pictures]
    if not drawn:
        return None
    rows = []
    for run in drawn:
        steps = list(run.pictures)
        chosen = np.unique(np.linspace(0, len(steps) - 1, _STEPS_SHOWN).round().astype(int))
        rows.append([(steps[i], ema_half(run.pictures[steps[i]])) for i in chosen])
    columns = max(map(len, rows))
    heights = [max(picture.shape[0] / picture.shape[1] for _, picture in row) for row in rows]
    title = "Samples of EMA weights" + (f": {drawn[0].name}" if len(drawn) == 1 else "")
    figure = style.new_figure(1.7 * columns + 0.2, 0.4 + sum(0.2 + 1.7 * height for height in heights), title)
    places = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for i, (run, row) in enumerate(zip(drawn, rows, strict=True)):
        for j, (step, picture) in enumerate(row):
            axes = figure.add_subplot(places[i, j], xticks=[], yticks=[])
            axes.imshow(picture)
            axes.spines[:].set_visible(False)
            axes.set_title(f"step {step:,}", pad=3)
            if not j and len(drawn) > 1:
                axes.set_ylabel(run.name, parse_math=False)
    return style.fitted(figure)


def ema_half(path: epath.Path) -> np.ndarray:
    """The right half of a picture of samples, uint8 (H, W, 3). Raises UserError."""
    advice = "repair or remove it"
    try:
        data = read_whole(path, _MAX_BYTES, advice=advice)
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width <= _GAP + 1 or image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"{image.height} pixels high and {image.width} pixels wide")
            picture = np.asarray(image.convert("RGB"))
    except (UserError, StorageError):
        raise
    except Exception as error:  # for broken files Pillow raises almost anything
        reason = "not a PNG" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
        raise UserError(f"picture {path} cannot be read ({reason}); {advice}") from None
    return picture[:, -((picture.shape[1] - _GAP) // 2) :]


def _with_any(runs: Sequence[Run], metrics: Sequence[str]) -> list[tuple[Run, str]]:
    """The runs with any of these metrics, and their colours."""
    return [
        (run, color)
        for run, color in zip(runs, style.colors(len(runs)), strict=True)
        if any(len(run.series(metric)[0]) for metric in metrics)
    ]


def _title(text: str, drawn: Sequence[tuple[Run, str]]) -> str:
    return f"{text}: {drawn[0][0].name}" if len(drawn) == 1 else text
