"""`marjax sample`."""

import argparse
import os

from marjax.commands.arguments import SAMPLE_FIELDS, join, parse_labels
from marjax.commands.next_step import measure_command, print_next
from marjax.errors import UserError
from marjax.paths import normalised
from marjax.ranges import check_arguments
from marjax.storage import is_remote
from marjax.workdir import read_workdir

HELP = "Sample from a trained work directory."
EXAMPLE = "marjax sample --workdir runs/digits --out samples"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True, metavar="DIR", help="where samples.npz and grid.png go")
    parser.add_argument("--labels", default="", help="classes such as 0-9 or 1,5,7; 'none' for unconditional; "
                        "all classes by default")
    parser.add_argument("--num_per_label", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=("ema", "raw"), help="ema by default, or what a converted one has")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument("--tokenizer_path", help="where the tokenizer's weights are now, if they have moved")
    for name, kind in SAMPLE_FIELDS.items():
        parser.add_argument(f"--{name}", type=kind, help="as config.sample by default")


def run(given: argparse.Namespace) -> None:
    import jax
    import numpy as np
    from etils import epath

    from marjax import distributed
    from marjax.generation.images import grid, make_folder, write_npz, write_png
    from marjax.generation.sample import sample

    check_arguments(num_per_label=given.num_per_label, seed=given.seed, step=given.step)
    config = read_workdir(given.workdir)
    classes = parse_labels(given.labels) if given.labels else list(range(config.data.num_classes))
    labels = np.repeat(np.array(classes), given.num_per_label)
    join(given)
    is_new = not is_remote(given.out) and not os.path.exists(given.out)  # an empty folder would be left behind
    out = epath.Path(normalised(given.out, "out"))
    distributed.on_first(lambda: make_folder(out))  # before the work, which would be lost
    try:
        images = sample(given.workdir, labels, seed=given.seed, weights=given.weights, step=given.step,
                        tokenizer_path=given.tokenizer_path,
                        **{name: getattr(given, name) for name in SAMPLE_FIELDS})
    except (UserError, KeyboardInterrupt):
        if is_new and jax.process_index() == 0:
            out.rmdir()
        raise
    if jax.process_index():
        return
    write_npz(out / "samples.npz", images=images, labels=labels)
    columns = given.num_per_label if len(classes) > 1 else max(1, round(len(images) ** 0.5))
    shown = min(columns, 20)  # of each class
    if len(classes) > 1:
        images = images.reshape(len(classes), given.num_per_label, *images.shape[1:])[:100, :shown]
        images = images.reshape(-1, *images.shape[2:])
    write_png(out / "grid.png", grid(images[:2000], shown))
    print(f"{len(labels)} images in {out / 'samples.npz'}, a picture in {out / 'grid.png'}")
    print_next(*measure_command(given.workdir, config))
