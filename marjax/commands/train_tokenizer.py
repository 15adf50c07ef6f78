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
    parser.add_argument("--out", metavar="FILE", help="the tokenizer (default: config.tokenizer.path)")
    parser.add_argument(
        "--workdir",
        help="work directory of an autoencoder: checkpoints, metrics and pictures (default: --out without its suffix)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file with other contents")


def run(args: argparse.Namespace) -> None:
    """Trains and writes a codebook or an autoencoder; prints its PSNR and the next command.

    Raises:
      UserError, TrainingError, PreemptedError: see `codebook.train_codebook`, `autoencoder.train_autoencoder`.
    """
    config = load_config(args.config, args.overrides)
    out = args.out or config.tokenizer.path
    if not out:
        raise UserError("no file to write the tokenizer to; give --out FILE, or --config.tokenizer.path=FILE")
    join(args, stops_at_steps=config.tokenizer.name != "codebook")
    if config.tokenizer.name == "codebook":
        if args.workdir:
            raise UserError("--workdir is for autoencoders; omit it for a codebook, which has no checkpoints")
        from marjax.tokenizer_training.codebook import train_codebook

        made = train_codebook(config, out, overwrite=args.overwrite)
    else:
        from marjax.tokenizer_training.autoencoder import train_autoencoder

        made = train_autoencoder(config, out, workdir=args.workdir, overwrite=args.overwrite)
    codes = f"{made['num_codes']} codes ({made['codes_used']} used), " if "num_codes" in made else ""
    scale = f", latents' std {made['std']:.4f}, scale {made['scale']:.5g}" if "scale" in made else ""
    print(
        f"{made['path']}: {codes}{made['num_images']} images, mse {made['mse']:.5f}, PSNR {made['psnr']:.2f} dB"
        f"{scale}, {made['seconds']:.1f} s"
    )
    path = {} if out == config.tokenizer.path else {"tokenizer.path": out}
    print_next(*train_command(args.config, args.overrides | path))
