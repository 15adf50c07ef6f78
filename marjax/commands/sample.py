"""`marjax sample`."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from marjax import class_names
from marjax.commands.arguments import SAMPLE_FIELDS, join, parse_labels
from marjax.commands.next_step import measure_command, print_next
from marjax.errors import UserError
from marjax.paths import normalised
from marjax.ranges import check_arguments
from marjax.storage import is_remote
from marjax.workdir import read_workdir

if TYPE_CHECKING:
    import numpy as np
    from etils import epath

    from marjax.generation.sample import Sampled

HELP = "Sample from a trained work directory."
EXAMPLE = "marjax sample --workdir runs/digits --out samples"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True)
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR|FILE.png|FILE.npz",
        help="where samples.npz and grid.png go; or the file for the picture or the samples alone",
    )
    parser.add_argument(
        "--labels",
        default="",
        help="classes such as 0-9, 1,5,7 or flower,temple; 'none' for unconditional; all classes by default",
    )
    parser.add_argument("--num_per_label", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=("ema", "raw"), help="ema by default, or what a converted one has")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument("--tokenizer_path", help="where the tokenizer's weights are now, if they have moved")
    for name, kind in SAMPLE_FIELDS.items():
        parser.add_argument(f"--{name}", type=kind, help="as config.sample by default")


def run(given: argparse.Namespace) -> None:
    check_arguments(num_per_label=given.num_per_label, seed=given.seed, step=given.step)
    config = read_workdir(given.workdir)
    num_classes = config.data.num_classes
    names = class_names.read(given.workdir, num_classes)
    classes = parse_labels(given.labels, names, num_classes) if given.labels else list(range(num_classes))
    join(given)
    import jax
    import numpy as np
    from etils import epath

    from marjax import distributed
    from marjax.files import make_folder
    from marjax.generation.sample import sampled
    from marjax.images import write_npz, write_png

    labels = np.repeat(np.array(classes), given.num_per_label)
    out = epath.Path(normalised(given.out, "out"))
    picture, samples = _files(out)
    folder = out if picture and samples else out.parent
    is_new = not is_remote(folder) and not folder.exists()  # an empty folder would be left behind
    distributed.on_first(lambda: make_folder(folder))  # before the work, which would be lost
    if jax.process_index() == 0 and (legend := class_names.legend(classes, names)):
        print(f"classes: {legend}", flush=True)
    try:
        made = sampled(
            given.workdir,
            labels,
            seed=given.seed,
            weights=given.weights,
            step=given.step,
            tokenizer_path=given.tokenizer_path,
            **{name: getattr(given, name) for name in SAMPLE_FIELDS},
        )
    except (UserError, KeyboardInterrupt):
        if is_new and jax.process_index() == 0:
            folder.rmdir()
        raise
    if jax.process_index():
        return
    if samples:
        known = {"class_names": np.array([name or "" for name in names])} if names else {}
        write_npz(samples, images=made.images, labels=made.labels, **known)
    if picture:
        write_png(picture, _picture(made, classes, given.num_per_label, names, _caption(given, made, classes, names)))
    if samples:
        print(f"{len(labels)} images in {samples}" + (f", a picture in {picture}" if picture else ""))
    else:
        print(f"a picture of {len(labels)} images in {picture}; with a folder as --out, samples.npz has the images")
    print_next(*measure_command(given.workdir, config))


def _files(out: "epath.Path") -> tuple["epath.Path | None", "epath.Path | None"]:
    """Where the picture and the samples go: both into a folder, or one of them into a file. Raises UserError."""
    suffix = out.suffix.lower()
    if not out.is_dir() and suffix in (".png", ".npz"):
        return (out, None) if suffix == ".png" else (None, out)
    return out / "grid.png", out / "samples.npz"


def _picture(
    made: "Sampled", classes: Sequence[int], num_per_label: int, names: class_names.Names, caption: str
) -> "np.ndarray":
    """A grid with a row for each class, or a square one of a single class."""
    from marjax.images import grid

    images = made.images
    side = min(64, 4 * images.shape[1])  # larger ones of 8 pixels are hard to recognise
    if len(classes) == 1:
        return grid(images[:2000], min(20, max(1, round(len(images) ** 0.5))), side, caption=caption)
    columns, shown = min(num_per_label, 20), classes[:100]
    images = images.reshape(len(classes), num_per_label, *images.shape[1:])[: len(shown), :columns]
    return grid(
        images.reshape(-1, *images.shape[2:]),
        columns,
        side,
        caption=caption,
        rows=[class_names.label(each, names) for each in shown],
    )


def _caption(given: argparse.Namespace, made: "Sampled", classes: Sequence[int], names: class_names.Names) -> str:
    """What a picture says of itself."""
    settings = made.settings
    of = f", class {class_names.label(classes[0], names)}" if len(classes) == 1 and classes[0] >= 0 else ""
    schedule = f" {settings.cfg_schedule}" if settings.cfg != 1 else ""
    return (
        f"{os.path.basename(given.workdir)}{of}: {made.weights} weights of step {made.step}, seed {given.seed}, "
        f"cfg {settings.cfg:g}{schedule}, num_iter {settings.num_iter}, num_sampling_steps "
        f"{settings.num_sampling_steps}, temperature {settings.temperature:g}"
    )
