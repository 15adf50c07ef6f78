"""`marjax sample`."""

import argparse
import os

from marjax import class_names
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
    parser.add_argument("--workdir", required=True, help="work directory of a trained or converted model")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR|FILE.png|FILE.npz",
        help="folder for samples.npz and grid.png; or a file for only the picture or only the samples",
    )
    parser.add_argument(
        "--labels",
        default="",
        help="classes, such as 0-9, 1,5,7 or flower,temple; 'none' for unconditional samples (default: all classes)",
    )
    parser.add_argument("--num_per_label", type=int, default=1, help="images per class (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="weights to use (default: ema, or those of a converted model)"
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--tokenizer_path", help="new path of the tokenizer's weights, if they have moved")
    for name, kind in SAMPLE_FIELDS.items():
        parser.add_argument(f"--{name}", type=kind, help=f"default: config.sample.{name}")


def run(args: argparse.Namespace) -> None:
    """Samples, and writes a picture and an .npz file; prints their paths and the next command.

    Raises:
      UserError: invalid arguments, or see `generation.sample`.
    """
    check_arguments(num_per_label=args.num_per_label, seed=args.seed, step=args.step)
    config = read_workdir(args.workdir)
    num_classes = config.data.num_classes
    names = class_names.read(args.workdir, num_classes)
    classes = parse_labels(args.labels, names, num_classes) if args.labels else list(range(num_classes))
    join(args)
    import jax
    import numpy as np
    from etils import epath

    from marjax import distributed
    from marjax.files import make_folder
    from marjax.generation.sample import sampled
    from marjax.generation.save import files, save

    labels = np.repeat(np.array(classes), args.num_per_label)
    out = epath.Path(normalised(args.out, "out"))
    picture, samples = files(out)
    folder = out if picture and samples else out.parent
    is_new = not is_remote(folder) and not folder.exists()
    distributed.on_first(lambda: make_folder(folder))  # fail before the work, not after it
    if jax.process_index() == 0 and (legend := class_names.legend(classes, names)):
        print(f"classes: {legend}", flush=True)
    try:
        made = sampled(
            args.workdir,
            labels,
            seed=args.seed,
            weights=args.weights,
            step=args.step,
            tokenizer_path=args.tokenizer_path,
            **{name: getattr(args, name) for name in SAMPLE_FIELDS},
        )
    except (UserError, KeyboardInterrupt):
        if is_new and jax.process_index() == 0:
            folder.rmdir()
        raise
    if jax.process_index():
        return
    save(made, out, classes=classes, names=names, title=os.path.basename(args.workdir), seed=args.seed)
    if samples:
        print(f"{len(labels)} images in {samples}" + (f", a picture in {picture}" if picture else ""))
    else:
        print(f"a picture of {len(labels)} images in {picture}; with a folder as --out, samples.npz has the images")
    print_next(*measure_command(args.workdir, config))
