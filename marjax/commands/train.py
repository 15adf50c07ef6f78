"""`marjax train`."""

import argparse
import shlex

from marjax import progress
from marjax.commands.arguments import add_config, check_files, join, load_config, parse_range
from marjax.commands.next_step import config_arguments, print_next, sample_command

HELP = "Train, or resume, in a work directory."
EXAMPLE = "marjax train --config digits --workdir runs/digits"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--workdir", required=True)
    parser.add_argument(
        "--init_from",
        metavar="WORKDIR",
        help="start from the weights of this work directory, of "
        "marjax convert or of another run, with a new optimizer (docs/finetuning.md)",
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace those steps, for TensorBoard or xprof, into the work directory's profile/",
    )


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    from marjax.workdir import refuse_weights_alone

    refuse_weights_alone(
        given.workdir,
        shlex.join(
            [
                "marjax",
                "train",
                "--config",
                *config_arguments(given.config, overrides),
                "--init_from",
                given.workdir,
                "--workdir",
                f"{given.workdir}_finetuned",
            ]
        ),
    )
    config = load_config(given.config, overrides)
    profile = None if given.profile is None else parse_range(given.profile)
    join(given, stops_at_steps=True)
    check_files(config, given.config, overrides)
    from etils import epath

    from marjax.training.train import train

    train(config, given.workdir, profile=profile, init_from=given.init_from)
    pictures = sorted((epath.Path(given.workdir) / "samples").glob("*.png")) if config.log.samples_every else []
    progress.note(
        f"{given.workdir}: trained for {config.train.steps} steps"
        + (f"; samples, raw weights left, EMA weights right: {pictures[-1]}" if pictures else "")
    )
    print_next(*sample_command(given.workdir, config.data.num_classes))
