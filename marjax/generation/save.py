"""Samples as files: an .npz with images and labels, and a picture of them."""

import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from marjax import class_names
from marjax.generation.sample import Sampled
from marjax.images import grid, write_npz, write_png

_MOST_COLUMNS, _MOST_ROWS, _MOST_IMAGES = 20, 100, 2000  # of a picture


def files(out: str | os.PathLike[str]) -> tuple[epath.Path | None, epath.Path | None]:
    """Returns the paths of the picture and the samples: both in a folder, or one of them for a .png or .npz file."""
    path = epath.Path(out)
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix in (".png", ".npz"):
        return (path, None) if suffix == ".png" else (None, path)
    return path / "grid.png", path / "samples.npz"


def save(
    made: Sampled,
    out: str | os.PathLike[str],
    *,
    classes: Sequence[int],
    names: class_names.Names = (),
    title: str,
    seed: int,
) -> None:
    """Writes samples to the `files` of `out`.

    Args:
      made: samples, equally many of each of `classes` in this order.
      out: an existing folder, or a .png or .npz file in one.
      classes: the classes, -1 for unconditional samples.
      names: class names.
      title: start of the picture's caption, before the settings.
      seed: the seed of the samples, for the caption.

    Raises:
      UserError: a file that cannot be written.
    """
    picture, samples = files(out)
    if samples:
        known = {"class_names": np.array([name or "" for name in names])} if names else {}
        write_npz(samples, images=made.images, labels=made.labels, **known)
    if picture:
        write_png(picture, _picture(made, classes, names, _caption(made, classes, names, title, seed)))


def _picture(made: Sampled, classes: Sequence[int], names: class_names.Names, caption: str) -> np.ndarray:
    """A grid with one row per class; a square grid for a single class."""
    images = made.images
    side = min(64, 4 * images.shape[1])  # images of 8 pixels are hard to recognise if enlarged more
    if len(classes) == 1:
        columns = min(_MOST_COLUMNS, max(1, round(len(images) ** 0.5)))
        return grid(images[:_MOST_IMAGES], columns, side, caption=caption)
    shown = classes[:_MOST_ROWS]
    images = images.reshape(len(classes), -1, *images.shape[1:])[: len(shown), :_MOST_COLUMNS]
    rows = [class_names.label(each, names) for each in shown]
    return grid(images.reshape(-1, *images.shape[2:]), images.shape[1], side, caption=caption, rows=rows)


def _caption(made: Sampled, classes: Sequence[int], names: class_names.Names, title: str, seed: int) -> str:
    settings = made.settings
    of = f", class {class_names.label(classes[0], names)}" if len(classes) == 1 and classes[0] >= 0 else ""
    schedule = f" {settings.cfg_schedule}" if settings.cfg != 1 else ""
    return (
        f"{title}{of}: {made.weights} weights of step {made.step}, seed {seed}, cfg {settings.cfg:g}{schedule}, "
        f"num_iter {settings.num_iter}, num_sampling_steps {settings.num_sampling_steps}, temperature "
        f"{settings.temperature:g}"
    )
