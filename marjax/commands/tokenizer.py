"""`marjax tokenizer`."""

import argparse

from marjax import config as config_lib
from marjax.commands.arguments import add_config
from marjax.errors import UserError

HELP = "Check a tokenizer: images through it and back."
EXAMPLE = "marjax tokenizer check --images pictures --path kl16.safetensors --out check"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("check",))
    parser.add_argument("--images", metavar="DIR", help="a folder of pictures; the data of --config by default")
    add_config(parser, required=False, what="the config whose tokenizer and data to take")
    parser.add_argument(
        "--name", default="", help="of the tokenizer, such as kl16; of --config or by the file's contents by default"
    )
    parser.add_argument("--path", metavar="FILE", help="of its weights; config.tokenizer.path by default")
    parser.add_argument("--image_size", type=int, help="pixels; of --config, or 256, by default")
    parser.add_argument("--num_images", type=int, default=256, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the picture goes")


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.load(given.config) if given.config is not None else None
    if overrides:
        if config is None:
            raise UserError("--config.key=value sets a field of a config: give --config NAME too")
        config = config_lib.apply_overrides(config, overrides)
    from marjax.tokenizer_training.reconstruction import check

    report = check(
        given.images,
        config,
        name=given.name,
        path=given.path or "",
        image_size=given.image_size,
        num_images=given.num_images,
        seed=given.seed,
        out=given.out,
    )
    size = report["image_size"]
    print(f"{report['num_images']} images of {size} x {size}: mse {report['mse']:.5f}, PSNR {report['psnr']:.2f} dB")
    if "codes_used" in report:
        print(f"{report['codes_used']} codes used")
    print(
        f"latents before scaling: mean {report['mean']:.4f}, std {report['std']:.4f}; the scale 1/std would be "
        f"{report['scale']:.5g}"
    )
    for channel, (mean, std) in enumerate(zip(report["channel_means"], report["channel_stds"], strict=True)):
        print(f"  channel {channel}: mean {mean:.4f}, std {std:.4f}")
    print(f"originals beside reconstructions in {report['picture']}")
