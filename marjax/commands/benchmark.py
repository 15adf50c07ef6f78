"""`marjax benchmark`."""

import argparse
import json

from marjax import config as config_lib
from marjax.commands.arguments import add_config
from marjax.errors import UserError
from marjax.ranges import check_arguments

HELP = (
    "Measure training, sampling, the host's own work in a training step, Inception's features of images of a "
    "config's size, or the metrics of 10,000 features; prints one JSON line."
)
EXAMPLE = "marjax benchmark train --config digits"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("train", "sample", "host", "features", "metrics"))
    add_config(parser, required=False, what="for all but metrics, the config")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; 0 only compiles, without any weights")
    parser.add_argument(
        "--recompute",
        type=int,
        default=0,
        help="sampling by a causal backbone: time so many steps without the KV cache too",
    )


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    from marjax.benchmarks.steps import benchmark

    check_arguments(repeats=given.repeats, recompute=given.recompute)
    if given.what == "metrics":
        from marjax.benchmarks.evaluation import metric_seconds

        print(json.dumps(metric_seconds()))
        return
    if given.config is None:
        raise UserError(f"benchmark {given.what} needs --config NAME")
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    if given.what == "features":
        from marjax.benchmarks.evaluation import feature_rate

        config = config_lib.check_fields(config)
        print(json.dumps(feature_rate(config.data.image_size, max(1, given.repeats))))
        return
    if given.what == "host":
        from marjax.benchmarks.host_overhead import host_work

        print(json.dumps(host_work(config)))
        return
    print(json.dumps(benchmark(given.what, config, given.repeats, given.recompute)))
