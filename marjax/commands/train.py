"""`marjax train`."""

import argparse
import shlex

from marjax import progress
from marjax.commands.arguments import add_config, check_files, join, load_config, parse_range
from marjax.commands.next_step import config_arguments, print_next, sample_command

HELP = "Train a config in a work directory, or resume."
EXAMPLE = "marjax train --config digits --workdir runs/digits"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--workdir", required=True, help="work directory: checkpoints, metrics and samples")
    parser.add_argument(
        "--init_from",
        metavar="WORKDIR",
        help="start from the weights of another work directory, trained or converted, with a new optimizer "
        "(docs/finetuning.md)",
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace these steps for TensorBoard or xprof, into profile/ of the work directory",
    )


def run(args: argparse.Namespace) -> None:
    """Trains, or resumes from the newest checkpoint; prints the next command.

    Raises:
      UserError, TrainingError, PreemptedError: see `training.train`.
    """
    from marjax.workdir import refuse_weights_alone

    command = ["train", "--config", *config_arguments(args.config, args.overrides), "--init_from", args.workdir]
    refuse_weights_alone(args.workdir, shlex.join(["marjax", *command, "--workdir", f"{args.workdir}_finetuned"]))
    config = load_config(args.config, args.overrides)
    profile = None if args.profile is None else parse_range(args.profile)
    join(args, stops_at_steps=True)
    check_files(config, args.config, args.overrides)
    from etils import epath

    from marjax.training.train import train

    train(config, args.workdir, profile=profile, init_from=args.init_from)
    pictures = sorted((epath.Path(args.workdir) / "samples").glob("*.png")) if config.log.samples_every else []
    progress.note(
        f"{args.workdir}: trained for {config.train.steps} steps"
        + (f"; samples, raw weights left, EMA weights right: {pictures[-1]}" if pictures else "")
    )
    print_next(*sample_command(args.workdir, config.data.num_classes))
