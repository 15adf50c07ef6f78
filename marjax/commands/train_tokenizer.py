"""`marjax train-tokenizer`."""

import argparse

from marjax.commands.arguments import add_config, join, load_config
from marjax.commands.next_step import print_next, train_command
from marjax.errors import UserError

HELP = "Train the tokenizer of a config, or resume."
EXAMPLE = "marjax train-tokenizer --config mnist:tokenizer=kl"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--out", metavar="FILE", help="config.tokenizer.path by default")
    parser.add_argument(
        "--workdir",
        help="of a network's checkpoints, metrics and pictures; by default the file's name without its suffix",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file with other contents")


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(given.config, overrides)
    out = given.out or config.tokenizer.path
    if not out:
        raise UserError("no file to write the tokenizer to: give --out FILE, or --config.tokenizer.path=FILE")
    join(given, stops_at_steps=config.tokenizer.name != "codebook")
    if config.tokenizer.name == "codebook":
        if given.workdir:
            raise UserError("--workdir is for networks: a codebook is found in one go")
        from marjax.tokenizer_training.codebook import train_codebook

        made = train_codebook(config, out, overwrite=given.overwrite)
    else:
        from marjax.tokenizer_training.autoencoder import train_autoencoder

        made = train_autoencoder(config, out, workdir=given.workdir, overwrite=given.overwrite)
    codes = f"{made['num_codes']} codes ({made['codes_used']} used), " if "num_codes" in made else ""
    scale = f", latents' std {made['std']:.4f}, scale {made['scale']:.5g}" if "scale" in made else ""
    print(
        f"{made['path']}: {codes}{made['num_images']} images, mse {made['mse']:.5f}, PSNR {made['psnr']:.2f} dB"
        f"{scale}, {made['seconds']:.1f} s"
    )
    path = {} if out == config.tokenizer.path else {"tokenizer.path": out}
    print_next(*train_command(given.config, overrides | path))
