"""Every field of a config, its default and its choices; the sizes of the paper's models."""

import functools
from collections.abc import Collection
from operator import getitem
from typing import Any

from ml_collections import ConfigDict, config_dict

from marjax.ranges import (
    BATCH,
    COUNT,
    COUNT_OR_NONE,
    IMAGE_SIZE,
    MAX_FLOAT,
    MIN_FLOAT,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    SHARE_BETWEEN,
    Range,
    integer,
)
from marjax.tokenizers import spec as autoencoder_spec
from marjax.variants import HEADS, VARIANTS

# Width, blocks of encoder and of decoder, heads; denoiser blocks and width (paper, section 4.3 and appendix B);
# guidance of the released models at temperature 1, 256 iterations, 100 diffusion steps (the reference's README).
MODEL_SIZES = {
    "mar_base": dict(width=768, depth=12, num_heads=12, denoiser_depth=6, denoiser_width=1024, cfg=2.9),
    "mar_large": dict(width=1024, depth=16, num_heads=16, denoiser_depth=8, denoiser_width=1280, cfg=3.0),
    "mar_huge": dict(width=1280, depth=20, num_heads=16, denoiser_depth=12, denoiser_width=1536, cfg=3.2),
}
# Smaller than the paper's, for a CPU and for a single accelerator.
SMALL_SIZES = {
    "tiny": dict(width=96, depth=2, num_heads=4, denoiser_depth=3, denoiser_width=128, buffer_size=4),
    "small": dict(width=384, depth=6, num_heads=6, denoiser_depth=3, denoiser_width=512, buffer_size=16),
}

CHOICES: dict[str, Collection[str]] = {
    "model.variant": VARIANTS,
    "model.head": HEADS,
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.denoiser.remat": ("none", "dots", "full"),
    "tokenizer.autoencoder.dtype": ("float32", "bfloat16"),
    "tokenizer.posterior": autoencoder_spec.POSTERIORS,
    "model.mask_ratio_per": ("image", "batch"),
    "train.schedule": ("constant", "cosine"),
    "init.weights": ("ema", "raw"),
    "sample.cfg_schedule": ("linear", "constant"),
    "eval.extractor": ("inception", "classifier"),
}

_WIDTH, _DEPTH, _WEIGHT, _CFG = integer(1, 2**16), integer(1, 1024), Range(0.0, 1e9), Range(0.0, 1e4)

# The range of every numeric field, and of each number in a list. None is always allowed where it is a default or
# NONE_IS_OFF. Values that train nothing, such as a learning rate of 0, are out of range.
RANGES = {
    "seed": SEED,
    "data.image_size": IMAGE_SIZE,
    "data.channels": integer(1, 3),
    "data.num_classes": integer(1, 2**20),
    "data.num_examples": integer(1, 2**40),
    "data.workers": integer(0, 1024),
    "tokenizer.patch_size": integer(1, 1024),
    "tokenizer.num_codes": integer(1, 2**24),
    "tokenizer.autoencoder.in_channels": _WIDTH,
    "tokenizer.autoencoder.width": _WIDTH,
    "tokenizer.autoencoder.channel_mults": integer(1, 1024),
    "tokenizer.autoencoder.num_res_blocks": _DEPTH,
    "tokenizer.autoencoder.latent_channels": _WIDTH,
    "tokenizer.autoencoder.embed_dim": _WIDTH,
    "tokenizer.autoencoder.encoder_attn_resolutions": IMAGE_SIZE,
    "tokenizer.autoencoder.decoder_attn_resolutions": IMAGE_SIZE,
    "tokenizer.autoencoder.resolution": IMAGE_SIZE,
    "tokenizer.autoencoder.scale": Range(MIN_FLOAT, 1e9),
    "tokenizer.train.batch_size": BATCH,
    "tokenizer.train.steps": COUNT,
    "tokenizer.train.lr": POSITIVE,
    "tokenizer.train.warmup_steps": COUNT_OR_NONE,
    "tokenizer.train.b1": SHARE_BELOW_ONE,
    "tokenizer.train.b2": SHARE_BELOW_ONE,
    "tokenizer.train.clip": Range(1e-6, MAX_FLOAT),
    "tokenizer.train.ema_decay": SHARE_BELOW_ONE,
    "tokenizer.train.kl_weight": _WEIGHT,
    "tokenizer.train.codebook_weight": _WEIGHT,
    "tokenizer.train.commitment": _WEIGHT,
    "tokenizer.train.restart_below": SHARE_BELOW_ONE,
    "tokenizer.train.disc.weight": _WEIGHT,
    "tokenizer.train.disc.start": COUNT_OR_NONE,
    "tokenizer.train.disc.width": _WIDTH,
    "tokenizer.train.disc.layers": integer(1, 16),
    "tokenizer.train.lpips.weight": _WEIGHT,
    "tokenizer.train.log_every": COUNT,
    "tokenizer.train.checkpoint_every": COUNT,
    "tokenizer.train.pictures_every": COUNT_OR_NONE,
    "tokenizer.train.scale_images": COUNT,
    "model.width": _WIDTH,
    "model.encoder_depth": _DEPTH,
    "model.decoder_depth": _DEPTH,
    "model.num_heads": _WIDTH,
    "model.mlp_ratio": Range(MIN_FLOAT, 1024.0),
    "model.buffer_size": _WIDTH,
    "model.attn_dropout": SHARE_BELOW_ONE,
    "model.proj_dropout": SHARE_BELOW_ONE,
    "model.class_dropout": SHARE,
    "model.mask_ratio.mean": Range(0.0, 2.0),
    "model.mask_ratio.std": Range(1e-3, 10.0),
    "model.mask_ratio.minimum": SHARE_BETWEEN,
    "model.denoiser.depth": _DEPTH,
    "model.denoiser.width": _WIDTH,
    "model.diffusion.num_steps": integer(4, 100_000),
    "model.diffusion_batch_mul": integer(1, 1024),
    "train.batch_size": BATCH,
    "train.epochs": Range(MIN_FLOAT, 1e9),
    "train.steps": COUNT,
    "train.accumulate": BATCH,
    "train.base_lr": POSITIVE,
    "train.lr": POSITIVE,
    "train.min_lr": Range(0.0, MAX_FLOAT),
    "train.warmup_epochs": Range(0.0, 1e9),
    "train.warmup_steps": COUNT_OR_NONE,
    "train.b1": SHARE_BELOW_ONE,
    "train.b2": SHARE_BELOW_ONE,
    "train.weight_decay": Range(0.0, 1e4),
    "train.clip": Range(1e-6, MAX_FLOAT),
    "train.ema_decay": SHARE_BELOW_ONE,
    "init.step": COUNT_OR_NONE,
    "mesh.data": integer(-1, 2**20),
    "mesh.fsdp": integer(-1, 2**20),
    "mesh.tensor": integer(-1, 2**20),
    "mesh.replicate_below": integer(0, 2**62),
    "checkpoint.every": COUNT,
    "checkpoint.keep": COUNT,
    "checkpoint.keep_every": COUNT_OR_NONE,
    "log.every": COUNT,
    "log.samples_every": COUNT_OR_NONE,
    "sample.num_iter": COUNT,
    "sample.cfg": _CFG,
    "sample.temperature": Range(0.0, 1e4),
    "sample.batch_size": BATCH,
    "sample.choice_temperature": Range(0.0, 1e4),
    "sample.max_stages": COUNT,
    "eval.every": COUNT_OR_NONE,
    "eval.num_images": integer(2),
    "eval.cfg": _CFG,
}

# Fields that are paths.
PATHS = (
    "data.data_dir",
    "data.cache",
    "tokenizer.path",
    "tokenizer.train.lpips.vgg",
    "tokenizer.train.lpips.linear",
    "eval.extractor_path",
    "eval.statistics",
    "init.path",
)

MAX_LENGTH = 16  # of lists of numbers

# Fields whose default is a number, which None turns off.
NONE_IS_OFF = ("train.clip", "tokenizer.train.clip")

# Fields that had another name before config format 3: old -> new.
RENAMED = {"eval.reference": "eval.statistics", "model.diffusion.batch_mul": "model.diffusion_batch_mul"}


def base() -> ConfigDict:
    """Every field with the paper's value where it has one; locked, so that no other field can be added.

    Fields of None are derived by `resolve`. Older names of fields (RENAMED) set the new ones.
    """
    config = fields()
    with config.unlocked():
        for old, new in RENAMED.items():
            *parents, leaf = new.split(".")
            reference = functools.reduce(getitem, parents, config).get_ref(leaf)
            *parents, leaf = old.split(".")
            functools.reduce(getitem, parents, config)[leaf] = reference
    return config


def fields() -> ConfigDict:
    """`base()` without the older names."""
    derived_int, derived_float, derived_str, derived_tuple = (
        functools.partial(config_dict.placeholder, kind) for kind in (int, float, str, tuple)
    )
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                source="digits",  # "digits", "mnist" (an extra), "tfds:NAME[/CONFIG][:VERSION]", or a registered one
                fingerprint=derived_str(),  # of data from Python or a registered source, set when training starts
                data_dir="",  # root of TFDS data sets; "" is the default of TFDS
                split="train",
                image_size=8,  # pixels; images are centre-cropped to it
                channels=1,  # 1 or 3
                num_classes=derived_int(),  # of the source, by default
                num_examples=derived_int(),  # only needed to count epochs; of the source, by default
                flip=False,  # horizontal, with probability 1/2
                workers=0,  # Grain worker processes; 0 reads in threads of this one
                cache="",  # latent cache written by marjax cache-latents; "" encodes while training
            ),
            tokenizer=dict(
                name="pixels",
                patch_size=1,  # side of a token, in latents
                path="",  # of the tokenizer's weights, if it has any
                num_codes=derived_int(),  # of a codebook or a VQ network; 512, or 16384 for vq16
                checksum=derived_str(),  # of the weights, filled in when training starts
                posterior="sample",  # of a KL network: train on samples ("sample") or on the "mean"
                # The network of "kl", "vq" and "vq_continuous" (marjax/tokenizers/spec.py); other names fix it.
                autoencoder=dict(
                    in_channels=derived_int(),  # of the image: data.channels
                    width=derived_int(),  # channels of the first layer, a multiple of 32; 128
                    channel_mults=derived_tuple(),  # of every level, each at half the resolution; (1, 1, 2, 2, 4)
                    num_res_blocks=derived_int(),  # per level; 2
                    latent_channels=derived_int(),  # 16 for kl, 8 for vq
                    embed_dim=derived_int(),  # channels of the latents; latent_channels
                    encoder_attn_resolutions=derived_tuple(),  # levels with attention besides the middle; none
                    decoder_attn_resolutions=derived_tuple(),
                    resolution=derived_int(),  # nominal image size for these levels; 256
                    scale=derived_float(),  # multiplies latents, also of "pixels"; from the file or the name
                    dtype="float32",  # of convolutions: "float32" or "bfloat16"; parameters are float32
                ),
                # How marjax train-tokenizer trains such a network; VQGAN's and LDM's values where they have one.
                train=dict(
                    batch_size=64,  # global
                    steps=100_000,
                    lr=derived_float(),  # 4.5e-6 * batch_size
                    warmup_steps=1000,
                    b1=0.5,
                    b2=0.9,
                    clip=config_dict.FieldReference(1.0),  # of the gradient's global norm; None or 0: no clipping
                    ema_decay=0.999,
                    ema_warmup=True,  # as in config.train
                    kl_weight=1e-6,  # of the KL summed over latents, relative to |x - x'| summed over values
                    codebook_weight=1.0,  # weight of the codebook loss
                    commitment=0.25,  # weight of the commitment loss
                    restart_below=0.05,  # codes chosen less often than this share of the average are restarted
                    disc=dict(weight=0.0, start=50_001, width=64, layers=3),  # patch discriminator; 0: off
                    lpips=dict(weight=0.0, vgg="", linear=""),  # files of its weights; 0: off
                    remat=False,  # recompute every block in the backward pass
                    log_every=50,  # steps
                    checkpoint_every=1000,
                    pictures_every=5000,
                    scale_images=10_000,  # at most, to measure the scale of the latents at the end
                ),
            ),
            model=dict(
                variant="mar",  # "ar", "random_ar" or "mar" (see marjax/variants.py), or a registered backbone
                head="diffusion",  # or "categorical", "regression", or a registered one
                extra="",  # settings of a registered backbone or head, "name=value,..."
                width=768,
                encoder_depth=12,
                decoder_depth=12,
                num_heads=12,
                mlp_ratio=4.0,
                buffer_size=64,  # class tokens at the start of the sequence
                attn_dropout=0.1,
                proj_dropout=0.1,
                class_dropout=0.1,  # share of images trained with the null class
                dtype="bfloat16",  # of matmuls and activations; parameters are float32
                remat="none",  # what the backward pass recomputes: "none", "dots" (all but weight matmuls) or "full"
                mask_ratio=dict(mean=1.0, std=0.25, minimum=0.7),  # of the truncated normal
                mask_ratio_per="image",  # one draw per image; "batch": one per batch, as in the reference
                denoiser=dict(depth=6, width=1024, remat="none"),
                diffusion=dict(num_steps=1000),  # timesteps of the chain
                diffusion_batch_mul=4,  # timesteps drawn per token in the diffusion loss
            ),
            train=dict(
                batch_size=2048,  # global
                epochs=derived_float(),
                steps=derived_int(),  # epochs * (num_examples // batch_size)
                accumulate=1,  # microbatches per step
                base_lr=1e-4,  # for a batch of 256 images
                lr=derived_float(),  # base_lr * batch_size / 256
                schedule=derived_str(),  # after warmup: "constant" or "cosine"; by default the head's
                min_lr=0.0,  # end of the cosine schedule
                warmup_epochs=derived_float(),
                warmup_steps=derived_int(),
                b1=0.9,
                b2=0.95,
                weight_decay=0.02,
                clip=config_dict.FieldReference(3.0),  # of the gradient's global norm; None or 0: no clipping
                ema_decay=0.9999,
                ema_warmup=False,  # min(ema_decay, (1 + n) / (10 + n)) at step n
            ),
            init=dict(  # a new run starts from these weights; see marjax/training/init_from.py
                path="",  # work directory of converted weights or another run; "": random weights
                weights=derived_str(),  # "ema" or "raw"; "ema" if available
                step=derived_int(),  # of the checkpoint; the newest
                checksum=derived_str(),  # of the weights, filled in when training starts
            ),
            mesh=dict(  # devices along each axis; -1: all remaining
                data=-1,  # the batch is sharded, the state is replicated
                fsdp=1,  # the batch and the state are sharded
                tensor=1,  # heads and hidden features are sharded, within one host
                replicate_below=2**16,  # elements (of a layer); smaller tensors are replicated
            ),
            checkpoint=dict(every=1000, keep=3, keep_every=0),  # steps; keep_every=0: only the latest `keep`
            log=dict(
                every=50,  # steps between lines of metrics
                samples_every=5000,  # steps between pictures of a batch of samples; 0: none
                tensorboard=True,
                wandb="",  # "PROJECT" or "ENTITY/PROJECT" of Weights & Biases (the extra marjax[wandb]); "": none
                mlflow="",  # of an MLflow tracking server, or sqlite:///FILE.db (the extra marjax[mlflow]); "": none
                progress=True,  # a bar, on a terminal
            ),
            sample=dict(
                num_iter=derived_int(),  # at most 64; the number of tokens if a step predicts one
                num_sampling_steps="100",  # or "ddimN"
                cfg=1.0,
                cfg_schedule="linear",
                temperature=1.0,
                batch_size=64,
                confidence_order=False,  # most confident tokens first (MaskGIT), instead of a random order
                choice_temperature=4.5,  # initial temperature of that choice, 0 at the last step
                max_stages=6,  # padded shapes of the generation steps
            ),
            # Defaults of marjax evaluate, and the smaller evaluation during training.
            eval=dict(
                every=0,  # steps between evaluations, each after a checkpoint; 0: none
                num_images=1000,  # per evaluation during training
                cfg=derived_float(),  # cfg of their second half; sample.cfg, and none if that is 1
                extractor="inception",  # or "classifier"
                extractor_path="",  # of its weights; inception has a default path
                statistics="",  # dataset statistics, written by marjax stats
            ),
        )
    ).lock()


def set_model_size(model: ConfigDict, size: str) -> None:
    """Sets the widths and depths of one of MODEL_SIZES or SMALL_SIZES, and the buffer of the latter."""
    sizes: dict[str, dict[str, Any]] = {**MODEL_SIZES, **SMALL_SIZES}
    spec = sizes[size]
    model.update(
        width=spec["width"], encoder_depth=spec["depth"], decoder_depth=spec["depth"], num_heads=spec["num_heads"]
    )
    model.denoiser.update(depth=spec["denoiser_depth"], width=spec["denoiser_width"])
    model.buffer_size = spec.get("buffer_size", model.buffer_size)
