"""`marjax plot`."""

import argparse

HELP = "Draw loss, evaluations and samples of work directories."
EXAMPLE = "marjax plot --workdir runs/digits --out plots"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, nargs="+", help="one or several")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the figures go")
    parser.add_argument("--format", nargs="+", default=["png", "svg"], choices=("png", "svg"), help="both by default")


def run(given: argparse.Namespace) -> None:
    from marjax.plots import plot

    for path in plot(given.workdir, given.out, given.format):
        print(path)
