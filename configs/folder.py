"""Your own pictures, prepared by `marjax prepare --images DIR --out D`: then `--config.data.data_dir=D`.

Arguments: name=NAME of the data set, size=32 (pixels, a multiple of 16),
model=tiny|small|mar_base|mar_large|mar_huge, variant=mar|ar|random_ar, tokenizer=pixels|kl16, debug (a tiny model for a
few steps; without a name on the embedded digits). The data set says how many classes there are.

`tiny` trains on two CPU cores in less than ten minutes, `small` on one accelerator. An image has 8 x 8 tokens, or
16 x 16 with size=64 or more and another model than tiny; with kl16, one for every 16 x 16 pixels.
"""

from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax.errors import UserError
from marjax.variants import VARIANTS

# Tokens per training step, which determine memory and so the batch size.
STEP_TOKENS = {"tiny": 2048, "small": 8192, "mar_base": 16384, "mar_large": 8192, "mar_huge": 4096}


def get_config(arg: str | None = None) -> ConfigDict:
    args = config_lib.parse_arg(
        arg,
        name="",
        size=32,
        model=tuple(STEP_TOKENS),
        variant=("mar", "ar", "random_ar"),
        tokenizer=("pixels", "kl16"),
        debug=False,
    )
    if not args.name and not args.debug:
        raise UserError(
            "config argument 'name' is missing; give folder:name=NAME, with the NAME printed by marjax prepare"
        )
    if args.size < 16 or args.size % 16:
        raise UserError(f"config argument size={args.size} is not divisible by 16; use a multiple of 16")
    tiny = args.model == "tiny"
    config = config_lib.base()
    config.data.update(
        source=f"tfds:{args.name}" if args.name else "digits",
        split="train",
        image_size=args.size,
        channels=3,
        flip=True,
        workers=0 if tiny else 4,
    )
    side = args.size // 16 if args.tokenizer == "kl16" else 8 if tiny or args.size < 64 else 16
    if args.tokenizer == "pixels":
        # Gives the mean colour of a patch a variance of about 1, like the noise (see marjax/tokenizers/pixels.py).
        config.tokenizer.update(name="pixels", patch_size=args.size // side)
        config.tokenizer.autoencoder.scale = 1.2 * side / args.size
    else:
        config.tokenizer.update(name=args.tokenizer, patch_size=1)
    config.model.variant = args.variant
    config_lib.set_model_size(config.model, args.model)
    # Steps rather than epochs, since a data set may have only a few hundred pictures.
    config.train.update(batch_size=min(256, max(1, STEP_TOKENS[args.model] // side**2)), ema_warmup=True)
    if tiny:
        # One timestep per token instead of four: on a CPU, more steps train better.
        config.model.update(attn_dropout=0.0, proj_dropout=0.0, dtype="float32")
        config.model.diffusion_batch_mul = 1
        config.train.update(steps=4000, lr=1.5e-3, warmup_steps=100, ema_decay=0.995)
        config.checkpoint.update(every=500)
        config.log.update(every=50, samples_every=4000)
    elif args.model == "small":
        config.train.update(steps=20_000, lr=3e-4, warmup_steps=1000, ema_decay=0.999)
        config.checkpoint.update(every=1000)
        config.log.update(every=100, samples_every=2000)
    else:
        config.model.remat = config.model.denoiser.remat = "full"
        config.train.update(steps=100_000, warmup_steps=2000)
        config.checkpoint.update(every=1000, keep_every=20_000)
        config.log.update(every=100, samples_every=5000)
    # "ddim25": see configs/digits.py. A low temperature and strong guidance hide errors of a model trained briefly.
    config.sample.update(
        num_iter=32 if VARIANTS[args.variant].many else None,
        num_sampling_steps="ddim25",
        cfg=5.0,
        temperature=0.65,
        batch_size=24,
        max_stages=3,
    )
    if args.debug:
        config.data.workers = 0
        config.model.update(width=32, encoder_depth=1, decoder_depth=1, num_heads=2, buffer_size=4)
        config.model.denoiser.update(depth=1, width=32)
        config.train.update(batch_size=16, steps=20, warmup_steps=5)
        config.checkpoint.update(every=10)
        config.log.update(every=5, samples_every=10)
        config.sample.update(
            num_iter=4 if VARIANTS[args.variant].many else None, num_sampling_steps="ddim5", batch_size=20
        )
    return config
