"""`marjax compile`."""

import argparse
import functools
import json

from marjax import config as config_lib
from marjax.commands.arguments import add_config, split_list
from marjax.errors import UserError

HELP = (
    "Compile a config's programs for a TPU slice that need not exist, and report memory, communication and the "
    "expected time."
)
EXAMPLE = "marjax compile --topology v5e-64 --config imagenet256:model=mar_huge"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="TPU slice, such as v5e:8x8, v4:2x2x4, v5e-64 or v4-32"
    )
    add_config(parser)
    parser.add_argument(
        "--programs", default="", metavar="A,B", help="programs among train, sample, encode, decode (default: all)"
    )
    parser.add_argument("--cached", action="store_true", help="train on a latent cache, as with config.data.cache")
    parser.add_argument(
        "--search",
        action="store_true",
        help="instead, find the largest batch per device that fits, by remat policy, without accumulation",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--hlo", metavar="DIR", help="folder for the compiled programs' HLO texts")


def run(args: argparse.Namespace) -> None:
    """Compiles, and prints a report of each program, or one JSON value.

    Raises:
      UserError: an invalid argument or config; or, after all reports, a program that did not compile.
    """
    config = config_lib.apply_overrides(config_lib.load(args.config), args.overrides)
    config_lib.resolve(config)  # report user errors before JAX starts
    if args.search and (args.programs or args.hlo):
        raise UserError("--search compiles only train steps and keeps none; omit --programs and --hlo")
    from marjax.compile.topology import prepare_environment

    prepare_environment()
    from marjax.compile.programs import NAMES
    from marjax.compile.run import compile_for, search_batch

    names = tuple(split_list(args.programs)) if args.programs else NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"--programs has {unknown[0]!r}; use {', '.join(NAMES)}")
    log = (lambda text: None) if args.json else functools.partial(print, flush=True)
    made: object
    if args.search:
        made = records = [each.to_json() for each in search_batch(config, args.topology, cached=args.cached, log=log)]
    else:
        made = compile_for(config, args.topology, names=names, cached=args.cached, hlo_dir=args.hlo or "", log=log)
        records = made["programs"]
    if args.json:
        print(json.dumps(made))
    if failed := [each for each in records if "error" in each]:
        raise UserError(f"{len(failed)} of {len(records)} did not compile; the first: {failed[0]['error']}")
