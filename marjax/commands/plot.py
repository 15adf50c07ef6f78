"""`marjax plot`."""

import argparse

HELP = "Plot the loss, evaluations and samples of work directories."
EXAMPLE = "marjax plot --workdir runs/digits --out plots"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, nargs="+", help="one or more work directories")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the figures")
    parser.add_argument(
        "--format", nargs="+", default=["png", "svg"], choices=("png", "svg"), help="file formats (default: both)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes figures and prints their paths. Raises UserError: see `plots.plot`."""
    from marjax.plots import plot

    for path in plot(args.workdir, args.out, args.format):
        print(path)
