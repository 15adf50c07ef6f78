"""`marjax export`."""

import argparse
import os

HELP = "Export the weights of a work directory under the reference's PyTorch names."
EXAMPLE = "marjax export --workdir runs/mar_base --out mar.safetensors"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="work directory of a trained or converted model")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="the exported file")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="weights to export (default: ema, or those of a converted model)"
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")


def run(args: argparse.Namespace) -> None:
    """Writes a safetensors file and prints its path and contents. Raises UserError: see `interop.export`."""
    from marjax.interop.export import export

    is_new = not os.path.exists(args.out)
    made = export(args.workdir, args.out, weights=args.weights, step=args.step)
    print(f"{args.out}{'' if is_new else ' is there already'}: {made['weights']} weights of step {made['step']}")
