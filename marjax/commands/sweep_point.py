"""`marjax sweep-point`."""

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


def run(given: argparse.Namespace) -> None:
    from marjax.sweep.points import PREPARE, end_with_parent, run_point

    if given.parent is not None:
        end_with_parent(given.parent)
    from marjax import distributed

    # SIGTERM has to end `prepare` as usual. Several points on one machine would take each other for one run: --alone.
    distributed.start(stops_at_steps=given.name != PREPARE, alone=given.alone)
    run_point(given.file, given.root, given.name)
