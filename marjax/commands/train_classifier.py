"""`marjax train-classifier`."""

import argparse

from marjax import config as config_lib
from marjax.commands.arguments import add_config, load_config
from marjax.commands.next_step import config_arguments, print_next
from marjax.errors import UserError

HELP = "Train the small network that measures samples of data which the Inception network does not know."
EXAMPLE = "marjax train-classifier --config mnist"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, what="the config whose data to learn")
    parser.add_argument("--out", metavar="FILE.npz", help="config.eval.extractor_path by default")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--held_out", type=float, default=0.2, help="share of the images that it is tested on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the file")


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(given.config, overrides)
    out = given.out or config.eval.extractor_path
    if not out:
        raise UserError("no file to write the classifier to: give --out FILE.npz, or --config.eval.extractor_path=FILE")
    from marjax.evaluation.networks.classifier import classifier_of

    data = config_lib.data_config(config)
    made = classifier_of(
        data, out, seed=given.seed, steps=given.steps, held_out=given.held_out, overwrite=given.overwrite
    )
    print(
        f"{out}: {made['accuracy']:.1%} right on {made['num_tested']} images that it was not trained on, of "
        f"{made['num_trained']} it was"
    )
    given_fields = {"eval.extractor": "classifier", "eval.extractor_path": out}
    fields = overrides | {key: value for key, value in given_fields.items() if config.eval[key[5:]] != value}
    to = [] if config.eval.statistics else ["--out", f"{out.removesuffix('.npz')}_statistics.npz"]
    print_next("stats", "--dataset", *config_arguments(given.config, fields), *to)
