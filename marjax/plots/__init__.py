"""Figures of runs and of their evaluations, as PNG and SVG.

Matplotlib is imported when a figure is drawn, without pyplot, and its settings are restored.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from etils import epath

from marjax import progress
from marjax.errors import UserError
from marjax.files import make_folder, write_bytes
from marjax.paths import takes_paths
from marjax.plots import style, tradeoffs, training
from marjax.plots.runs import Run, read_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")

# A function returns None if there is nothing to draw.
FIGURES: dict[str, Callable[[Sequence[Run]], "Figure | None"]] = {
    "loss": training.loss,
    "eval": training.evaluations,
    "samples": training.samples,
    "tradeoff_time": tradeoffs.over_time,
    **{f"tradeoff_{setting}": functools.partial(tradeoffs.over, along=setting) for setting in tradeoffs.AXES},
}


@takes_paths("workdirs", "out")
def plot(
    workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], formats: Sequence[str] = FORMATS
) -> list[epath.Path]:
    """Draws the figures in FIGURES for which the work directories have data, one file per format.

    `loss`, `eval` and `samples` show `metrics.jsonl` and `samples/`, the others the `evaluation.json` of `marjax
    evaluate`.

    Args:
      workdirs: local paths or gs:// addresses; each has one colour in all figures.
      out: a folder, created if missing.
      formats: some of "png", "svg".

    Returns:
      The files written.

    Raises:
      UserError: an unreadable directory or file, nothing to draw, or a folder that cannot be written.
    """
    if not formats or not set(formats) <= set(FORMATS):
        raise UserError(f"formats={','.join(formats)!r} is invalid; use {' or '.join(FORMATS)}")
    runs = read_runs(workdirs)
    files: dict[str, bytes] = {}  # drawn before the first is written, which finds all errors
    with style.applied():
        for name, draw in FIGURES.items():
            with progress.activity(f"drawing {name}"):
                figure = draw(runs)
            if figure is not None:
                files |= {f"{name}.{each}": data for each, data in style.render(figure, formats).items()}
    if not files:
        raise UserError(
            f"nothing to draw in {', '.join(map(str, workdirs))}; expected train/loss or a distance such as eval/fid "
            f"in metrics.jsonl, pictures in samples, or two results in evaluation.json that differ in one of "
            f"{', '.join(tradeoffs.AXES)}"
        )
    folder = make_folder(out)
    for name, data in files.items():
        write_bytes(folder / name, data)
    return [folder / name for name in files]
