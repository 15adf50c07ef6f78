"""`marjax tokenizer`."""

import argparse

from marjax import config as config_lib
from marjax.commands.arguments import add_config
from marjax.errors import UserError

HELP = "Check a tokenizer: encode and decode images, and measure the error."
EXAMPLE = "marjax tokenizer check --images pictures --path kl16.safetensors --out check"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("check",), help="what to do")
    parser.add_argument("--images", metavar="DIR", help="folder of pictures (default: the data of --config)")
    add_config(parser, required=False, what="config whose tokenizer and data to use")
    parser.add_argument(
        "--name", default="", help="tokenizer, such as kl16 (default: that of --config, or by the file's contents)"
    )
    parser.add_argument("--path", metavar="FILE", help="its weights (default: config.tokenizer.path)")
    parser.add_argument("--image_size", type=int, help="size in pixels (default: that of --config, or 256)")
    parser.add_argument("--num_images", type=int, default=256, help="number of images, at most (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the picture")


def run(args: argparse.Namespace) -> None:
    """Reconstructs images; prints PSNR and statistics of the latents, and writes a picture.

    Raises:
      UserError: missing arguments, or see `reconstruction.check`.
    """
    config = config_lib.load(args.config) if args.config is not None else None
    if args.overrides:
        if config is None:
            raise UserError("--config.key=value sets a field of a config; give --config NAME too")
        config = config_lib.apply_overrides(config, args.overrides)
    from marjax.tokenizer_training.reconstruction import check

    report = check(
        args.images,
        config,
        name=args.name,
        path=args.path or "",
        image_size=args.image_size,
        num_images=args.num_images,
        seed=args.seed,
        out=args.out,
    )
    size = report["image_size"]
    print(f"{report['num_images']} images of {size} x {size}: mse {report['mse']:.5f}, PSNR {report['psnr']:.2f} dB")
    if "codes_used" in report:
        print(f"{report['codes_used']} codes used")
    print(
        f"latents before scaling: mean {report['mean']:.4f}, std {report['std']:.4f}; scale 1/std: "
        f"{report['scale']:.5g}"
    )
    for channel, (mean, std) in enumerate(zip(report["channel_means"], report["channel_stds"], strict=True)):
        print(f"  channel {channel}: mean {mean:.4f}, std {std:.4f}")
    print(f"originals and reconstructions in {report['picture']}")
