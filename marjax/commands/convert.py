"""`marjax convert`."""

import argparse
import shlex

from marjax.commands.next_step import print_next, sample_command
from marjax.errors import UserError

HELP = (
    "Convert a PyTorch or safetensors checkpoint of the reference to a work directory, or an autoencoder's to a "
    "tokenizer file."
)
EXAMPLE = "marjax convert --checkpoint checkpoint-last.pth --tokenizer kl16.ckpt --out runs/mar_base"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="checkpoint of the model, or the index or folder of its shards; omit it to convert only a tokenizer",
    )
    parser.add_argument("--inception", metavar="FILE", help="instead, PyTorch weights of FID's Inception network")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="checkpoint of its autoencoder, such as kl16.ckpt, or of a latent diffusion model with one",
    )
    parser.add_argument(
        "--out",
        metavar="WORKDIR",
        help="work directory; FILE.safetensors for only a tokenizer or Inception, which has a default",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="weights of a checkpoint with both, or of only a tokenizer (default: ema)",
    )


def run(args: argparse.Namespace) -> None:
    """Converts a checkpoint; prints what it holds and the next command.

    Raises:
      UserError: arguments that do not go together, or a file that cannot be converted.
    """
    if args.inception is not None:
        if args.checkpoint or args.tokenizer or args.weights or args.overrides:
            raise UserError("--inception is converted alone; omit --checkpoint, --tokenizer, --weights and --config.*")
        from marjax.evaluation.networks.inception_file import convert_inception

        path, is_new = convert_inception(args.inception, args.out)
        print(f"{path}{'' if is_new else ' is there already'}: FID's Inception network")
        return
    if args.out is None:
        raise UserError("--out missing; give a WORKDIR, or FILE.safetensors for only a tokenizer")
    if args.checkpoint is None:
        _convert_tokenizer(args)
        return
    from marjax.interop.convert import convert

    done = convert(args.checkpoint, args.out, weights=args.weights, tokenizer=args.tokenizer, overrides=args.overrides)
    model, sample = done.config.model, done.config.sample
    print(
        f"{args.out}{'' if done.is_new else ' is there already'}: {done.weights} weights, "
        f"{done.num_params / 1e6:.2f} M parameters, {model.width} wide, {model.encoder_depth} + "
        f"{model.decoder_depth} blocks, {model.num_heads} heads; num_iter {sample.num_iter}, cfg {sample.cfg}, "
        f"temperature {sample.temperature}"
    )
    command = sample_command(args.out, done.config.data.num_classes)
    if done.config.tokenizer.name == "pixels" or args.tokenizer:
        print_next(*command)
    else:
        print(
            f"it needs its autoencoder to sample: marjax convert --tokenizer FILE --out FILE.safetensors, then "
            f"marjax {shlex.join(command)} --tokenizer_path FILE.safetensors"
        )


def _convert_tokenizer(args: argparse.Namespace) -> None:
    if args.tokenizer is None or args.overrides:
        raise UserError(
            "--checkpoint missing; give --checkpoint FILE (a tokenizer alone takes only --tokenizer FILE, --weights "
            "and --out FILE.safetensors)"
        )
    from marjax.interop.convert_tokenizer import convert_tokenizer

    made, is_new = convert_tokenizer(args.tokenizer, args.out, weights=args.weights)
    scale = "an unknown scale (config.tokenizer.autoencoder.scale)" if made.scale is None else f"scale {made.scale}"
    print(
        f"{args.out}{'' if is_new else ' is there already'}: tokenizer {made.name}, stride {made.spec.stride}, "
        f"{made.spec.embed_dim} channels, {scale}"
    )
