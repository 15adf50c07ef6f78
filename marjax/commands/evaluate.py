"""`marjax evaluate`."""

import argparse
import os

from marjax.commands.arguments import join, split_list
from marjax.commands.next_step import plot_command, print_next
from marjax.evaluation.record import RECORD, SETTINGS

HELP = "Sample from a work directory and measure: FID and more."
EXAMPLE = "marjax evaluate --workdir runs/digits --num_images 1000"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", metavar="DIR", help="where evaluation.json goes; the work directory by default")
    parser.add_argument("--num_images", type=int, default=50_000, help="equally many of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", metavar="ema,raw", help="one or both; the first there is by default")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument(
        "--batch_size", type=int, help="images at a time on a host; config.sample.batch_size by default"
    )
    parser.add_argument("--extractor", choices=("inception", "classifier"), help="of the config by default")
    parser.add_argument("--extractor_path", metavar="FILE", help="of its weights")
    parser.add_argument(
        "--statistics",
        "--reference",  # the older name, for one release
        metavar="FILE.npz",
        help="statistics of real images; of the config by default (--reference is the older name)",
    )
    parser.add_argument("--tokenizer_path", help="where the tokenizer's weights are now, if they have moved")
    parser.add_argument("--save", choices=("npz", "png"), default="", help="keep the samples")
    parser.add_argument("--overwrite", action="store_true", help="measure again what has been measured")
    for name in SETTINGS:
        parser.add_argument(f"--{name}", metavar="A,B", help="one or several, all combinations of which are measured")


def run(given: argparse.Namespace) -> None:
    from marjax.evaluation.evaluate import Request, evaluate, table

    join(given)
    settings = {name: split_list(getattr(given, name)) for name in SETTINGS if getattr(given, name) is not None}
    entries = evaluate(
        given.workdir,
        Request(
            num_images=given.num_images,
            seed=given.seed,
            weights=split_list(given.weights) if given.weights else (None,),
            step=given.step,
            settings=settings,
            batch_size=given.batch_size,
            extractor=given.extractor,
            extractor_path=given.extractor_path,
            statistics=given.statistics,
            tokenizer_path=given.tokenizer_path,
            save=given.save,
            out=given.out,
            overwrite=given.overwrite,
        ),
    )
    print(table(entries))
    statistics, extractor = entries[0]["statistics"], entries[0]["extractor"]
    print(
        f"against {statistics['name']} (sha256 {statistics['checksum'][:12]}) by {extractor['name']}; all there is to "
        f"know is in {os.path.join(given.out or given.workdir, RECORD)}"
    )
    print_next(*plot_command(given.out or given.workdir))
