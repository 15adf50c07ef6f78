"""`marjax train-classifier`."""

import argparse

from marjax import config as config_lib
from marjax.commands.arguments import add_config, load_config
from marjax.commands.next_step import config_arguments, print_next
from marjax.errors import UserError

HELP = "Train a small classifier as feature extractor, for data that Inception does not know."
EXAMPLE = "marjax train-classifier --config mnist"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, what="config whose data to use")
    parser.add_argument("--out", metavar="FILE.npz", help="the classifier (default: config.eval.extractor_path)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    parser.add_argument(
        "--held_out", type=float, default=0.2, help="share of images held out for testing (default: 0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> None:
    """Trains and writes a classifier; prints its accuracy and the next command.

    Raises:
      UserError: no file to write to, or see `classifier.classifier_of`.
    """
    config = load_config(args.config, args.overrides)
    out = args.out or config.eval.extractor_path
    if not out:
        raise UserError("no file to write the classifier to; give --out FILE.npz, or --config.eval.extractor_path=FILE")
    from marjax.evaluation.networks.classifier import classifier_of

    data = config_lib.data_config(config)
    made = classifier_of(data, out, seed=args.seed, steps=args.steps, held_out=args.held_out, overwrite=args.overwrite)
    print(
        f"{out}: accuracy {made['accuracy']:.1%} on {made['num_tested']} held-out images, trained on "
        f"{made['num_trained']}"
    )
    used = {"eval.extractor": "classifier", "eval.extractor_path": out}
    fields = args.overrides | {key: value for key, value in used.items() if config.eval[key[5:]] != value}
    to = [] if config.eval.statistics else ["--out", f"{out.removesuffix('.npz')}_statistics.npz"]
    print_next("stats", "--dataset", *config_arguments(args.config, fields), *to)
