"""`marjax train`."""

import argparse

from marjax.commands.arguments import add_config, join, load_config, parse_range

HELP = "Train, or resume, in a work directory."
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace those steps, for TensorBoard or xprof, into "
                        "the work directory's profile/")


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(given.config, overrides)
    profile = None if given.profile is None else parse_range(given.profile)
    join(given, stops_at_steps=True)
    from marjax.training.loop import train

    train(config, given.workdir, profile=profile)
