"""`marjax stats`."""

import argparse
import os
import shlex

from marjax import progress
from marjax.commands.arguments import add_config, join, load_config
from marjax.commands.next_step import num_images, print_next, train_command, workdir_of
from marjax.errors import UserError

HELP = "Compute the dataset statistics that samples are compared with."
EXAMPLE = "marjax stats --dataset mnist"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "--dataset", "--config", required=False, what="config whose data to use")
    parser.add_argument("--images", metavar="DIR", help="instead, a folder of pictures")
    parser.add_argument("--npz", metavar="FILE", help="instead, a file with images as arr_0")
    parser.add_argument("--out", metavar="FILE.npz", help="the statistics (default: config.eval.statistics)")
    parser.add_argument(
        "--extractor",
        choices=("inception", "classifier"),
        help="network (default: config.eval.extractor, or inception)",
    )
    parser.add_argument("--extractor_path", metavar="FILE", help="its weights (default: config.eval.extractor_path)")
    parser.add_argument("--image_size", type=int, help="size in pixels that pictures of a folder are cropped to")
    parser.add_argument(
        "--keep_features", type=int, default=10_000, help="images whose features are kept, at most (default: 10000)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch (default: 64)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> None:
    """Writes dataset statistics; prints their size and checksum, and the next command.

    Raises:
      UserError: missing arguments, or see `statistics.make_statistics`.
    """
    if args.overrides and args.dataset is None:
        raise UserError("--config.key=value sets a field of a config; give --dataset NAME too")
    config = None if args.dataset is None else load_config(args.dataset, args.overrides)
    out = args.out or (config.eval.statistics if config is not None else "")
    if not out:
        raise UserError("no file to write the statistics to; give --out FILE.npz, or --config.eval.statistics=FILE")
    join(args)
    from marjax.evaluation.statistics import make_statistics

    made = make_statistics(
        out,
        config=config,
        images=args.images,
        npz=args.npz,
        extractor=args.extractor,
        extractor_path=args.extractor_path,
        image_size=args.image_size,
        keep_features=args.keep_features,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )
    assert made.gaussian is not None and made.extractor is not None
    kept = 0 if made.features is None else len(made.features)
    print(
        f"{out}: {made.gaussian.count} images of {made.source}, {len(made.gaussian.mean)} features of "
        f"{made.extractor['name']}, features of {kept} images kept; sha256 {made.checksum[:12]}"
    )
    if config is None:
        progress.note(f"to evaluate: marjax evaluate --workdir WORKDIR --statistics {shlex.quote(out)}")
        return
    workdir, extractor = workdir_of(args.dataset), made.extractor["name"]
    if not os.path.isdir(os.path.join(workdir, "checkpoints")):
        fields = {} if out == config.eval.statistics else {"eval.statistics": out}
        print_next(*train_command(args.dataset, args.overrides | fields))
        return
    path = args.extractor_path or (config.eval.extractor_path if extractor == config.eval.extractor else "")
    files = ["--statistics", out, "--extractor", extractor, *(["--extractor_path", path] if path else [])]
    print_next("evaluate", "--workdir", workdir, *num_images(config), *files)
