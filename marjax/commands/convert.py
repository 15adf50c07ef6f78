"""`marjax convert`."""

import argparse
import shlex

from marjax.commands.next_step import print_next, sample_command
from marjax.errors import UserError

HELP = (
    "Make a work directory of a PyTorch or safetensors checkpoint of the reference, or a tokenizer's file of an "
    "autoencoder's."
)
EXAMPLE = "marjax convert --checkpoint checkpoint-last.pth --tokenizer kl16.ckpt --out runs/mar_base"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="of the model, or the index or folder of its shards; leave it out to convert a tokenizer alone",
    )
    parser.add_argument("--inception", metavar="FILE", help="instead, the PyTorch weights of FID's Inception network")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="of its autoencoder, such as kl16.ckpt, or of a latent diffusion model that holds it",
    )
    parser.add_argument(
        "--out",
        metavar="WORKDIR",
        help="or FILE.safetensors, of a tokenizer or Inception network "
        "alone; the latter has a default, where it is looked for",
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="of a checkpoint with both, or of a tokenizer alone; ema by default"
    )


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    if given.inception is not None:
        if given.checkpoint or given.tokenizer or given.weights or overrides:
            raise UserError("--inception is converted alone: leave out --checkpoint, --tokenizer and the rest")
        from marjax.evaluation.networks.inception_file import convert_inception

        path, is_new = convert_inception(given.inception, given.out)
        print(f"{path}{'' if is_new else ' is there already'}: FID's Inception network")
        return
    if given.out is None:
        raise UserError("no --out: give a WORKDIR, or FILE.safetensors for a tokenizer alone")
    if given.checkpoint is None:
        if given.tokenizer is None or overrides:
            raise UserError(
                "give --checkpoint FILE; a tokenizer alone takes only --tokenizer FILE, --weights and "
                "--out FILE.safetensors"
            )
        from marjax.interop.convert_tokenizer import convert_tokenizer

        made, is_new = convert_tokenizer(given.tokenizer, given.out, weights=given.weights)
        scale = "an unknown scale (config.tokenizer.autoencoder.scale)" if made.scale is None else f"scale {made.scale}"
        print(
            f"{given.out}{'' if is_new else ' is there already'}: tokenizer {made.name}, stride {made.spec.stride}, "
            f"{made.spec.embed_dim} channels, {scale}"
        )
        return
    from marjax.interop.convert import convert

    done = convert(given.checkpoint, given.out, weights=given.weights, tokenizer=given.tokenizer, overrides=overrides)
    model, sample = done.config.model, done.config.sample
    print(
        f"{given.out}{'' if done.is_new else ' is there already'}: {done.weights} weights, "
        f"{done.num_params / 1e6:.2f} M parameters, {model.width} wide, {model.encoder_depth} + "
        f"{model.decoder_depth} blocks, {model.num_heads} heads; num_iter {sample.num_iter}, cfg {sample.cfg}, "
        f"temperature {sample.temperature}"
    )
    needs = done.config.tokenizer.name != "pixels" and not given.tokenizer
    command = sample_command(given.out, done.config.data.num_classes)
    if needs:
        print(
            f"it needs its autoencoder to sample: marjax convert --tokenizer FILE --out FILE.safetensors, then "
            f"marjax {shlex.join(command)} --tokenizer_path FILE.safetensors"
        )
    else:
        print_next(*command)
