"""`marjax benchmark`."""

import argparse
import json

from marjax import config as config_lib
from marjax.commands.arguments import add_config
from marjax.errors import UserError
from marjax.ranges import check_arguments

HELP = (
    "Measure the speed of training, of sampling, of the host's own work in a training step, of Inception on images of "
    "a config's size, or of the metrics on 10,000 features."
)
EXAMPLE = "marjax benchmark train --config digits"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("train", "sample", "host", "features", "metrics"), help="what to measure")
    add_config(parser, required=False, what="config to measure (all but metrics)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; 0 only compiles (default: 3)")
    parser.add_argument(
        "--recompute",
        type=int,
        default=0,
        metavar="STEPS",
        help="also time this many sampling steps of a causal backbone without the KV cache (default: 0)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs one of `marjax.benchmarks` and prints its result as one JSON line. Raises UserError."""
    check_arguments(repeats=args.repeats, recompute=args.recompute)
    print(json.dumps(_measure(args)))


def _measure(args: argparse.Namespace) -> dict[str, object]:
    from marjax.benchmarks import evaluation, host_overhead, steps

    if args.what == "metrics":
        return dict(evaluation.metric_seconds())
    if args.config is None:
        raise UserError(f"benchmark {args.what} needs a config; give --config NAME")
    config = config_lib.apply_overrides(config_lib.load(args.config), args.overrides)
    if args.what == "features":
        return evaluation.feature_rate(config_lib.check_fields(config).data.image_size, max(1, args.repeats))
    if args.what == "host":
        return host_overhead.host_work(config)
    return steps.benchmark(args.what, config, args.repeats, args.recompute)
