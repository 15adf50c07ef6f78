"""ImageNet at 256 x 256 with KL-16 latents: the paper's recipe (section 4.3, appendix B) and sampling settings.

Arguments: model=mar_base|mar_large|mar_huge, variant=mar|ar|random_ar, debug (a tiny model on the embedded digits, a
minute on a laptop).
"""

from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax.variants import VARIANTS


def get_config(arg: str | None = None) -> ConfigDict:
    args = config_lib.parse_arg(
        arg, model=tuple(config_lib.MODEL_SIZES), variant=("mar", "ar", "random_ar"), debug=False
    )
    config = config_lib.base()
    config.data.update(
        source="tfds:imagenet2012",
        split="train",
        image_size=256,
        channels=3,
        num_classes=1000,
        num_examples=1_281_167,
        flip=True,
        workers=8,
    )
    config.tokenizer.update(name="kl16", patch_size=1)
    config_lib.set_model_size(config.model, args.model)
    config.model.variant = args.variant
    # From docs/tpu.md: a batch of 2048 fits on 16 v4 chips and on 64 v5e chips. Recomputing costs little, since HBM and
    # the vector unit are busier than the matrix unit. The base model's state is replicated, so that any number of
    # devices works; the larger ones are sharded over 16 devices, which keeps tiles full.
    config.model.remat = config.model.denoiser.remat = "full"
    if args.model != "mar_base":
        config.mesh.fsdp = 16
    config.train.update(batch_size=2048, epochs=400.0, warmup_epochs=100.0)
    config.checkpoint.update(every=5000, keep_every=50_000)
    config.log.update(every=100, samples_every=10_000)
    config.sample.update(
        num_iter=256, num_sampling_steps="100", temperature=1.0, cfg=config_lib.MODEL_SIZES[args.model]["cfg"]
    )
    if args.debug:
        config.data.update(source="digits", image_size=32, num_classes=10, num_examples=1797, workers=0)
        config.tokenizer.update(name="pixels", patch_size=8)
        config.mesh.fsdp = 1
        config.model.update(width=32, encoder_depth=1, decoder_depth=1, num_heads=2, buffer_size=4, remat="none")
        config.model.denoiser.update(depth=1, width=32, remat="none")
        config.train.update(batch_size=16, epochs=None, steps=20, warmup_epochs=None, warmup_steps=5, ema_warmup=True)
        config.checkpoint.update(every=10)
        config.log.update(every=5, samples_every=10)
        config.sample.update(
            num_iter=4 if VARIANTS[args.variant].many else None, num_sampling_steps="ddim5", batch_size=20
        )
    return config
