"""`marjax compile`."""

import argparse
import functools
import json

from marjax import config as config_lib
from marjax.commands.arguments import add_config, split_list
from marjax.errors import UserError

HELP = (
    "Compile a config's programs for a TPU slice that need not be there: do they fit, what do they send, how long "
    "would they take."
)
EXAMPLE = "marjax compile --topology v5e-64 --config imagenet256:model=mar_huge"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:8x8, v4:2x2x4, v5e-64 or v4-32")
    add_config(parser)
    parser.add_argument(
        "--programs", default="", metavar="A,B", help="of train, sample, encode, decode; all by default"
    )
    parser.add_argument("--cached", action="store_true", help="train on a latent cache, as with config.data.cache")
    parser.add_argument(
        "--search",
        action="store_true",
        help="instead, find the largest batch a device that fits, by remat policy, without accumulation",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--hlo", metavar="DIR", help="keep the compiled programs' HLO texts")


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    config_lib.resolve(config)  # report user errors before JAX starts
    if given.search and (given.programs or given.hlo):
        raise UserError("--search compiles train steps only and keeps none: leave out --programs and --hlo")
    from marjax.compile.topology import prepare_environment

    prepare_environment()
    from marjax.compile.programs import NAMES
    from marjax.compile.run import compile_for, search_batch

    names = tuple(split_list(given.programs)) if given.programs else NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"--programs has {unknown[0]!r}: give some of {','.join(NAMES)}")
    log = (lambda text: None) if given.json else functools.partial(print, flush=True)
    made: object
    if given.search:
        made = records = [each.to_json() for each in search_batch(config, given.topology, cached=given.cached, log=log)]
    else:
        made = compile_for(config, given.topology, names=names, cached=given.cached, hlo_dir=given.hlo or "", log=log)
        records = made["programs"]
    if given.json:
        print(json.dumps(made))
    if failed := [each for each in records if "error" in each]:
        raise UserError(f"{len(failed)} of {len(records)} did not compile; the first: {failed[0]['error']}")
