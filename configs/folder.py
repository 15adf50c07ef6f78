"""Your own pictures, prepared by `marjax prepare --images DIR --out D`: then `--config.data.data_dir=D`.

Arguments: name=NAME of the data set, size=64 (pixels, a multiple of 16), model=small|mar_base|mar_large|mar_huge,
variant=mar|ar|random_ar, tokenizer=pixels|kl16, debug (a tiny model for a few steps; without a name on the embedded
digits). Every form has 256 tokens with pixels, or with kl16 at size=256. How many classes there are, the data set says.
"""

from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax.errors import UserError
from marjax.variants import VARIANTS


def get_config(arg: str | None = None) -> ConfigDict:
    args = config_lib.parse_arg(arg, name="", size=64, model=("small", *config_lib.MODEL_SIZES),
                                variant=("mar", "ar", "random_ar"), tokenizer=("pixels", "kl16"), debug=False)
    if not args.name and not args.debug:
        raise UserError("config argument 'name' is missing: give configs/folder.py:name=NAME with the NAME that marjax "
                        "prepare has printed")
    if args.size < 16 or args.size % 16:
        raise UserError(f"config argument size={args.size}: give a multiple of 16 pixels")
    config = config_lib.base()
    config.data.update(source=f"tfds:{args.name}" if args.name else "digits", split="train", image_size=args.size,
                       channels=3, flip=True, workers=4)
    config.tokenizer.update(name=args.tokenizer, patch_size=args.size // 16 if args.tokenizer == "pixels" else 1)
    config.model.variant = args.variant
    if args.model == "small":
        config.model.update(width=384, encoder_depth=6, decoder_depth=6, num_heads=6, buffer_size=16)
        config.model.denoiser.update(depth=3, width=512)
    else:
        config_lib.set_model_size(config.model, args.model)
    # Steps rather than epochs: an epoch of a few hundred pictures is no measure.
    config.train.update(batch_size=256, steps=100_000, warmup_steps=2000, ema_warmup=True)
    config.checkpoint.update(every=1000, keep_every=20_000)
    config.log.update(every=100, samples_every=5000)
    config.sample.update(cfg=2.0)
    if args.debug:
        config.data.workers = 0
        config.model.update(width=32, encoder_depth=1, decoder_depth=1, num_heads=2, buffer_size=4)
        config.model.denoiser.update(depth=1, width=32)
        config.train.update(batch_size=16, steps=20, warmup_steps=5)
        config.checkpoint.update(every=10)
        config.log.update(every=5, samples_every=10)
        config.sample.update(num_iter=4 if VARIANTS[args.variant].many else None, num_sampling_steps="ddim5",
                             batch_size=20)
    return config
