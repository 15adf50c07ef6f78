"""Every field of a config, its default and its choices; the sizes of the paper's models."""

import functools

from ml_collections import ConfigDict, config_dict

from marjax.tokenizers import spec as autoencoder_spec
from marjax.variants import HEADS, VARIANTS

# Width, blocks of encoder and of decoder, heads; denoiser blocks and width (paper, section 4.3 and appendix B);
# guidance of the released models at temperature 1, 256 iterations, 100 diffusion steps (the reference's README).
MODEL_SIZES = {
    "mar_base": dict(width=768, depth=12, num_heads=12, denoiser_depth=6, denoiser_width=1024, cfg=2.9),
    "mar_large": dict(width=1024, depth=16, num_heads=16, denoiser_depth=8, denoiser_width=1280, cfg=3.0),
    "mar_huge": dict(width=1280, depth=20, num_heads=16, denoiser_depth=12, denoiser_width=1536,
                     cfg=3.2),
}

CHOICES = {
    "model.variant": tuple(VARIANTS),
    "model.head": tuple(HEADS),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.denoiser.remat": ("none", "dots", "full"),
    "tokenizer.autoencoder.dtype": ("float32", "bfloat16"),
    "tokenizer.posterior": autoencoder_spec.POSTERIORS,
    "model.mask_ratio_per": ("image", "batch"),
    "train.schedule": ("constant", "cosine"),
    "sample.cfg_schedule": ("linear", "constant"),
    "eval.extractor": ("inception", "classifier"),
}


# Fields whose default is a number, which None turns off.
NONE_IS_OFF = ("train.clip", "tokenizer.train.clip")


def base() -> ConfigDict:
    """Every field there is, with the paper's value where it has one; locked, so that no other field can be added.

    Fields of None are derived by `resolve`.
    """
    derived_int, derived_float, derived_str, derived_tuple = (
        functools.partial(config_dict.placeholder, kind) for kind in (int, float, str, tuple))
    return ConfigDict(dict(
        seed=0,
        data=dict(
            source="digits",  # "digits", "mnist" (an extra), or "tfds:NAME[/CONFIG][:VERSION]"
            data_dir="",  # where TFDS data sets are; "" is the library's default
            split="train",
            image_size=8,  # pixels; images are centre-cropped to it
            channels=1,  # 1 or 3
            num_classes=derived_int(),  # of the source, by default
            num_examples=derived_int(),  # only needed to count epochs; of the source, by default
            flip=False,  # horizontal, with probability 1/2
            workers=0,  # Grain worker processes; 0 reads in threads of this one
            cache="",  # folder of this data set's latents, made by marjax cache-latents; "" encodes while training
        ),
        tokenizer=dict(
            name="pixels",
            patch_size=1,  # latents on a token's side
            path="",  # of the tokenizer's weights, for those that have any
            num_codes=derived_int(),  # of a codebook or a VQ network; 512, or what vq16 has
            checksum=derived_str(),  # of the weights, filled in when training starts
            posterior="sample",  # of a KL network: train on draws from it ("sample"), or on its "mean"
            # The network of "kl", "vq" and "vq_continuous" (see marjax/tokenizers/spec.py); fixed by the other names.
            autoencoder=dict(
                in_channels=derived_int(),  # of the image: data.channels
                width=derived_int(),  # channels of the first layer, a multiple of 32; 128
                channel_mults=derived_tuple(),  # of every level, each half as large as the one before; (1, 1, 2, 2, 4)
                num_res_blocks=derived_int(),  # a level; 2
                latent_channels=derived_int(),  # 16 for kl, 8 for vq
                embed_dim=derived_int(),  # of the latents a model sees; latent_channels
                encoder_attn_resolutions=derived_tuple(),  # levels with attention besides the middle; none
                decoder_attn_resolutions=derived_tuple(),
                resolution=derived_int(),  # image size that those are out of, whatever data.image_size; 256
                scale=derived_float(),  # of the latents; the file's own, or the name's
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
                kl_weight=1e-6,  # of the divergence's sum over latents, beside the sum of |x - x'| over values
                codebook_weight=1.0,  # of codes' distance from latents
                commitment=0.25,  # and of latents' from codes, beside it
                restart_below=0.05,  # codes chosen less often than this share of the average move to where latents are
                disc=dict(weight=0.0, start=50_001, width=64, layers=3),  # the patch discriminator; 0: none
                lpips=dict(weight=0.0, vgg="", linear=""),  # with the files of its weights; 0: none
                remat=False,  # recompute every block in the backward pass
                log_every=50,  # steps
                checkpoint_every=1000,
                pictures_every=5000,
                scale_images=10_000,  # at most, that the scale of the latents is measured on at the end
            ),
        ),
        model=dict(
            variant="mar",  # "ar", "random_ar" or "mar": see marjax/variants.py
            head="diffusion",  # or "categorical", "regression"
            width=768,
            encoder_depth=12,
            decoder_depth=12,
            num_heads=12,
            mlp_ratio=4.0,
            buffer_size=64,  # class tokens in front of the sequence
            attn_dropout=0.1,
            proj_dropout=0.1,
            class_dropout=0.1,  # share of images trained with the null class
            dtype="bfloat16",  # of matmuls and activations; parameters are float32
            remat="none",  # what the backward pass recomputes: "none", "dots" (all but weight matmuls) or "full"
            mask_ratio=dict(mean=1.0, std=0.25, minimum=0.7),  # of the truncated normal
            mask_ratio_per="image",  # each image draws its own; "batch" for one draw for all, as the reference
            denoiser=dict(depth=6, width=1024, remat="none"),
            diffusion=dict(num_steps=1000, batch_mul=4),  # timesteps of the chain; timesteps drawn a token
        ),
        train=dict(
            batch_size=2048,  # global
            epochs=derived_float(),
            steps=derived_int(),  # epochs * (num_examples // batch_size)
            accumulate=1,  # microbatches a step
            base_lr=1e-4,  # for 256 images a step
            lr=derived_float(),  # base_lr * batch_size / 256
            schedule=derived_str(),  # after the warmup, "constant" or "cosine"; the head's own by default
            min_lr=0.0,  # where the cosine ends
            warmup_epochs=derived_float(),
            warmup_steps=derived_int(),
            b1=0.9,
            b2=0.95,
            weight_decay=0.02,
            clip=config_dict.FieldReference(3.0),  # of the gradient's global norm; None or 0: no clipping
            ema_decay=0.9999,
            ema_warmup=False,  # min(ema_decay, (1 + n) / (10 + n)) at step n
        ),
        mesh=dict(  # devices along each axis; -1 takes what is left
            data=-1,  # the batch is cut, the state is whole on each
            fsdp=1,  # the batch and the state are cut
            tensor=1,  # heads and hidden features are cut, within one host
            replicate_below=2**16,  # elements (of a layer); smaller tensors stay whole all the same
        ),
        checkpoint=dict(every=1000, keep=3, keep_every=0),  # steps; keep_every=0: only the latest `keep`
        log=dict(
            every=50,  # steps between lines of metrics
            samples_every=5000,  # steps between pictures of a batch of samples; 0: none
            tensorboard=True,
            progress=True,  # a bar, on a terminal
        ),
        sample=dict(
            num_iter=derived_int(),  # 64, or as many as there are tokens: all of them where one is predicted at a time
            num_sampling_steps="100",  # or "ddimN"
            cfg=1.0,
            cfg_schedule="linear",
            temperature=1.0,
            batch_size=64,
            confidence_order=False,  # the surest tokens first, instead of an order drawn ahead (MaskGIT)
            choice_temperature=4.5,  # how random that choice is at first; it falls to 0 at the last step
            max_stages=6,  # padded shapes the generation steps are grouped into
        ),
        # What marjax evaluate measures with by default, and the smaller evaluation during training.
        eval=dict(
            every=0,  # steps between evaluations (a checkpoint goes before each), and after the last; 0: none
            num_images=1000,  # of those
            cfg=derived_float(),  # guidance of the second half of those; sample.cfg, and none if that is 1
            extractor="inception",  # or "classifier"
            extractor_path="",  # of its weights; inception has a place of its own
            reference="",  # file of the real images' statistics (see marjax stats)
        ),
    )).lock()


def set_model_size(model: ConfigDict, size: str) -> None:
    """Sets the widths and depths of one of MODEL_SIZES."""
    spec = MODEL_SIZES[size]
    model.update(width=spec["width"], encoder_depth=spec["depth"], decoder_depth=spec["depth"],
                 num_heads=spec["num_heads"])
    model.denoiser.update(depth=spec["denoiser_depth"], width=spec["denoiser_width"])
