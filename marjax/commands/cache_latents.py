"""`marjax cache-latents`."""

import argparse

from marjax.commands.arguments import add_config, check_files, join, load_config
from marjax.commands.next_step import print_next, train_command

HELP = "Encode the images of a config once, for training to read."
EXAMPLE = "marjax cache-latents --config imagenet256 --config.tokenizer.path=kl16.safetensors --out data/imagenet_kl16"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="what config.data.cache names in training")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the moments")
    parser.add_argument("--batch_size", type=int, default=32, help="images a device encodes at a time")
    parser.add_argument(
        "--shard_examples", type=int, help="images a file; by default, for at most 64 MiB and at least 64 files"
    )
    parser.add_argument("--overwrite", action="store_true", help="start afresh, and replace what is there")
    parser.add_argument("--measure", action="store_true", help="time the network alone too")


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(given.config, overrides)
    join(given)
    check_files(config, given.config, overrides)
    from marjax.training.latent_cache import cache_latents

    made = cache_latents(
        config,
        given.out,
        dtype=given.dtype,
        batch_size=given.batch_size,
        shard_examples=given.shard_examples,
        overwrite=given.overwrite,
        measure=given.measure,
    )
    manifest = made.manifest
    print(
        f"{given.out}: {manifest.num_examples:,} images{' and their mirror images' if manifest.flips else ''}, "
        f"moments {manifest.dtype} {manifest.shape}, {made.num_bytes / 2**20:,.1f} MiB in {manifest.num_shards} files"
        + ("" if made.encoded else "; all were there, nothing done")
    )
    if made.seconds:
        print(
            f"{made.images_per_second:,.4g} images/s; at most {made.wait:.1%} of the time waiting for images (more "
            f"config.data.workers lower it)"
        )
    if given.measure and made.seconds:
        print(f"the network alone: {made.alone:,.4g} images/s; the ratio is {made.images_per_second / made.alone:.2f}")
    print_next(*train_command(given.config, overrides | {"data.cache": given.out}))
