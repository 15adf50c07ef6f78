"""`marjax sweep-point`, which `marjax sweep` starts for each point."""

import argparse

HELP = ""
EXAMPLE = "marjax sweep-point sweep.py --root runs/sweep --name NAME"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file")
    parser.add_argument("--root", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--parent", type=int)


def run(args: argparse.Namespace) -> None:
    """Runs one point of a sweep; see `sweep.points.run_point`."""
    from marjax.sweep.points import PREPARE, end_with_parent, run_point

    if args.parent is not None:
        end_with_parent(args.parent)
    from marjax import distributed

    # SIGTERM must end `prepare` at once. --alone keeps the points on one machine from joining one run.
    distributed.start(stops_at_steps=args.name != PREPARE, alone=args.alone)
    run_point(args.file, args.root, args.name)
