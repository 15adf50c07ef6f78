"""Figures of runs and of their evaluations, for papers and for the eye: PNG and SVG.

Matplotlib is imported when a figure is drawn, without pyplot, and its settings are left as they were.
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

# A figure is None where there is nothing to draw in it.
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
    """Draws what the work directories have: the keys of FIGURES, each in one file a format.

    `loss`, `eval` and `samples` are drawn of `metrics.jsonl` and `samples/`, the others of `evaluation.json`, which
    `marjax evaluate` writes. The same input gives the same bytes.

    Args:
      workdirs: local paths or gs:// addresses; each has one colour in all figures.
      out: a folder, made if need be.
      formats: some of "png", "svg".

    Returns:
      The files written.

    Raises:
      UserError: a directory or file that cannot be read, nothing to draw, or a folder that cannot be written.
    """
    if not formats or not set(formats) <= set(FORMATS):
        raise UserError(f"formats are {', '.join(formats) or 'none'}: give some of {', '.join(FORMATS)}")
    runs = read_runs(workdirs)
    files: dict[str, bytes] = {}  # all of them before the first is written: whatever is wrong shows while drawing
    with style.applied():
        for name, draw in FIGURES.items():
            with progress.activity(f"drawing {name}"):
                figure = draw(runs)
            if figure is not None:
                files |= {f"{name}.{each}": data for each, data in style.render(figure, formats).items()}
    if not files:
        raise UserError(
            f"nothing to draw in {', '.join(map(str, workdirs))}: looked for train/loss or a distance such "
            f"as eval/fid in metrics.jsonl, pictures in samples, and two results in evaluation.json that "
            f"differ in one of {', '.join(tradeoffs.AXES)}"
        )
    folder = make_folder(out)
    for name, data in files.items():
        write_bytes(folder / name, data)
    return [folder / name for name in files]
