"""`marjax evaluate`."""

import argparse
import os

from marjax.commands.arguments import join, split_list
from marjax.commands.next_step import plot_command, print_next
from marjax.evaluation.record import RECORD, SETTINGS

HELP = "Sample from a work directory, and compute FID and other metrics."
EXAMPLE = "marjax evaluate --workdir runs/digits --num_images 1000"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="work directory of a trained or converted model")
    parser.add_argument("--out", metavar="DIR", help="folder for evaluation.json (default: the work directory)")
    parser.add_argument(
        "--num_images", type=int, default=50_000, help="images, equally many of each class (default: 50000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the samples (default: 0)")
    parser.add_argument("--weights", metavar="ema,raw", help="one or both (default: ema, or raw if there is no EMA)")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--batch_size", type=int, help="images per host and batch (default: config.sample.batch_size)")
    parser.add_argument(
        "--extractor", choices=("inception", "classifier"), help="network (default: config.eval.extractor)"
    )
    parser.add_argument("--extractor_path", metavar="FILE", help="its weights (default: config.eval.extractor_path)")
    parser.add_argument(
        "--statistics",
        "--reference",  # the older name, for one release
        metavar="FILE.npz",
        help="dataset statistics (default: config.eval.statistics); --reference is the older name",
    )
    parser.add_argument("--tokenizer_path", help="new path of the tokenizer's weights, if they have moved")
    parser.add_argument("--save", choices=("npz", "png"), default="", help="also save the samples")
    parser.add_argument("--overwrite", action="store_true", help="repeat existing measurements")
    for name in SETTINGS:
        parser.add_argument(
            f"--{name}",
            metavar="A,B",
            help=f"one or more values; all combinations are measured (default: config.sample.{name})",
        )


def run(args: argparse.Namespace) -> None:
    """Evaluates a work directory; prints a table, the record's path and the next command.

    Raises:
      UserError, TrainingError: see `evaluation.evaluate`.
    """
    from marjax.evaluation.evaluate import Request, evaluate, table

    join(args)
    settings = {name: split_list(getattr(args, name)) for name in SETTINGS if getattr(args, name) is not None}
    entries = evaluate(
        args.workdir,
        Request(
            num_images=args.num_images,
            seed=args.seed,
            weights=split_list(args.weights) if args.weights else (None,),
            step=args.step,
            settings=settings,
            batch_size=args.batch_size,
            extractor=args.extractor,
            extractor_path=args.extractor_path,
            statistics=args.statistics,
            tokenizer_path=args.tokenizer_path,
            save=args.save,
            out=args.out,
            overwrite=args.overwrite,
        ),
    )
    print(table(entries))
    statistics, extractor = entries[0]["statistics"], entries[0]["extractor"]
    out = args.out or args.workdir
    print(
        f"against {statistics['name']} (sha256 {statistics['checksum'][:12]}) by {extractor['name']}; the full record "
        f"is in {os.path.join(out, RECORD)}"
    )
    print_next(*plot_command(out))
