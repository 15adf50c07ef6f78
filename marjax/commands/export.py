"""`marjax export`."""

import argparse
import os

HELP = "Write the weights of a work directory under the reference's PyTorch names."
EXAMPLE = "marjax export --workdir runs/mar_base --out mar.safetensors"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True, metavar="FILE.safetensors")
    parser.add_argument("--weights", choices=("ema", "raw"), help="ema by default, or what a converted one has")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")


def run(given: argparse.Namespace) -> None:
    from marjax.interop.export import export

    is_new = not os.path.exists(given.out)
    made = export(given.workdir, given.out, weights=given.weights, step=given.step)
    print(f"{given.out}{'' if is_new else ' is there already'}: {made['weights']} weights of step {made['step']}")
