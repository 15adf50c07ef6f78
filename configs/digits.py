"""The 1797 handwritten digits from scikit-learn, 8x8 pixels: the quick start, under two minutes on two cores.

Arguments: debug.
"""

from ml_collections import ConfigDict

from marjax import config as config_lib


def get_config(arg: str | None = None) -> ConfigDict:
    args = config_lib.parse_arg(arg, debug=False)
    config = config_lib.base()
    config.data.update(source="digits", split="train", image_size=8, channels=1, num_classes=10, num_examples=1797)
    config.tokenizer.update(name="pixels", patch_size=2)
    config.model.update(
        width=64,
        encoder_depth=2,
        decoder_depth=2,
        num_heads=4,
        buffer_size=4,
        attn_dropout=0.0,
        proj_dropout=0.0,
        dtype="float32",
    )
    config.model.denoiser.update(depth=2, width=64)
    config.train.update(batch_size=64, steps=450, lr=2e-3, warmup_steps=100, ema_decay=0.995, ema_warmup=True)
    config.checkpoint.update(every=150)
    config.log.update(every=50, samples_every=450)
    # "ddim25" starts at timestep 960. The plain spacing starts at 999, where a step multiplies the denoiser's error by
    # several hundred, which is too much after two minutes of training.
    config.sample.update(
        num_iter=16, num_sampling_steps="ddim25", cfg=2.0, temperature=0.9, batch_size=100, max_stages=3
    )
    config.eval.update(
        extractor="classifier", extractor_path="runs/digits_classifier.npz", statistics="runs/digits_statistics.npz"
    )
    if args.debug:
        config.model.update(width=32, encoder_depth=1, decoder_depth=1)
        config.model.denoiser.update(depth=1, width=32)
        config.train.update(batch_size=16, steps=20, warmup_steps=5)
        config.checkpoint.update(every=10)
        config.log.update(every=5, samples_every=10)
        config.sample.update(num_iter=4, num_sampling_steps="ddim5", batch_size=20, max_stages=1)
    return config
