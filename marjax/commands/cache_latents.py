"""`marjax cache-latents`."""

import argparse

from marjax.commands.arguments import add_config, check_files, join, load_config
from marjax.commands.next_step import print_next, train_command

HELP = "Encode the images of a config once, as a latent cache for training."
EXAMPLE = "marjax cache-latents --config imagenet256 --config.tokenizer.path=kl16.safetensors --out data/imagenet_kl16"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the latent cache; config.data.cache in training")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the moments (default: bfloat16)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images per device and batch (default: 32)")
    parser.add_argument(
        "--shard_examples", type=int, help="images per file (default: at most 64 MiB, and at least 64 files)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again, and replace an existing cache")
    parser.add_argument("--measure", action="store_true", help="also time the network alone")


def run(args: argparse.Namespace) -> None:
    """Writes or resumes a latent cache; prints its size, its speed and the next command.

    Raises:
      UserError, TrainingError: see `latent_cache.cache_latents`.
    """
    config = load_config(args.config, args.overrides)
    join(args)
    check_files(config, args.config, args.overrides)
    from marjax.training.latent_cache import cache_latents

    made = cache_latents(
        config,
        args.out,
        dtype=args.dtype,
        batch_size=args.batch_size,
        shard_examples=args.shard_examples,
        overwrite=args.overwrite,
        measure=args.measure,
    )
    manifest = made.manifest
    print(
        f"{args.out}: {manifest.num_examples:,} images{' and their mirror images' if manifest.flips else ''}, "
        f"moments {manifest.dtype} {manifest.shape}, {made.num_bytes / 2**20:,.1f} MiB in {manifest.num_shards} files"
        + ("" if made.encoded else "; all were there, nothing done")
    )
    if made.seconds:
        print(
            f"{made.images_per_second:,.4g} images/s; at most {made.wait:.1%} of the time waiting for images (more "
            f"config.data.workers lower it)"
        )
    if args.measure and made.seconds:
        print(f"network alone: {made.alone:,.4g} images/s; ratio {made.images_per_second / made.alone:.2f}")
    print_next(*train_command(args.config, args.overrides | {"data.cache": args.out}))
