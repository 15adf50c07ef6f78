"""The config: every field with its default, strict overrides, derived values, and the copy in the work directory.

A file under `configs/` has `get_config(arg)`, which starts from `base()`. `load` runs it, `apply_overrides` sets single
fields, `resolve` checks the result and computes what follows from it; everything else takes a resolved config.
"""

import copy
import difflib
import functools
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from marjax.errors import UserError
from marjax.tokenizers import TokenShape, token_shape
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


def base() -> ConfigDict:
    """Every field there is, with the paper's value where it has one. Fields of None are derived by `resolve`."""
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
                clip=1.0,  # of the gradient's global norm
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
            clip=3.0,  # of the gradient's global norm
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
    ))


def set_model_size(model: ConfigDict, size: str) -> None:
    """Sets the widths and depths of one of MODEL_SIZES."""
    spec = MODEL_SIZES[size]
    model.update(width=spec["width"], encoder_depth=spec["depth"], decoder_depth=spec["depth"],
                 num_heads=spec["num_heads"])
    model.denoiser.update(depth=spec["denoiser_depth"], width=spec["denoiser_width"])


def parse_arg(arg: str | None, **spec: Any) -> ConfigDict:
    """A config file's argument, "name=value,flag", typed by its defaults.

    Args:
      arg: what follows the colon in `configs/x.py:arg`; None or "" for all defaults.
      **spec: name=default of type bool, int, float or str; or a tuple of the allowed strings, the default first.

    Raises:
      UserError: an unknown name or a value of the wrong type or not among the allowed.
    """
    values = {name: default[0] if isinstance(default, tuple) else default for name, default in spec.items()}
    for part in filter(None, (arg or "").split(",")):
        name, has_value, text = part.partition("=")
        if name not in spec:
            raise UserError(f"unknown config argument {name!r}{_closest(name, spec)}; there are: {', '.join(spec)}")
        if not has_value:
            if not isinstance(spec[name], bool):
                raise UserError(f"config argument {name!r} needs a value: {name}=...")
            text = "true"
        if isinstance(spec[name], tuple):
            if text not in spec[name]:
                raise UserError(f"config argument {name}={text!r}: give one of {', '.join(spec[name])}")
            values[name] = text
        else:
            values[name] = _parse(name, text, type(spec[name]))
    return ConfigDict(values)


def load(path: str) -> ConfigDict:
    """The config of "FILE.py" or "FILE.py:ARG", not yet resolved.

    Raises:
      UserError: no such file, or one without `get_config`.
    """
    file, _, arg = path.partition(":")
    config = load_function(file, "config", "get_config")(arg or None)
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {file!r} returned {type(config).__name__}, not a ConfigDict")
    return config


class _AsItIs(importlib.machinery.SourceFileLoader):
    """Compiles the file every time and writes nothing beside it.

    What Python keeps compiled is told apart by size and whole seconds: a file that was just changed could be the old.
    """

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_function(file: str, kind: str, name: str) -> Callable[..., Any]:
    """The function of that name in a Python file that is no module of ours; `kind` says in errors what file it is.

    Raises:
      UserError: no such file, or one without that function.
    """
    if not os.path.isfile(file):
        raise UserError(f"{kind} file {file!r} does not exist: give a Python file with {name}")
    module_name = f"marjax_{kind}_file"
    loader = _AsItIs(module_name, file)
    spec = importlib.util.spec_from_file_location(module_name, file, loader=loader)
    if not file.endswith(".py") or spec is None:
        raise UserError(f"{kind} file {file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # as dataclasses and pickle expect of a module
    loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{kind} file {file!r} has no {name}")
    return getattr(module, name)


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy with single fields set; strings are parsed to the field's type.

    Raises:
      UserError: an unknown field (naming the closest), a section, or a value of the wrong type.
    """
    config = copy.deepcopy(config)  # keeps the types of fields that are None
    fields = flatten(config)
    for key, value in overrides.items():
        if key not in fields:
            sections = {name.rsplit(".", 1)[0] for name in fields if "." in name}
            if key in sections:
                raise UserError(f"config.{key} is a section: set one of its fields, such as "
                                f"{next(name for name in fields if name.startswith(key + '.'))}")
            raise UserError(f"unknown config key {key!r}{_closest(key, fields)}")
        *parents, leaf = key.split(".")
        section = config
        for name in parents:
            section = section[name]
        kind = section.get_type(leaf)
        value = _parse(key, value, kind) if isinstance(value, str) else value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is tuple and isinstance(value, list):  # as JSON has them
            value = tuple(value)
        try:
            section[leaf] = value
        except TypeError:
            raise UserError(f"config.{key} is {value!r}: expected {kind.__name__}") from None
    return config


def resolve(config: ConfigDict) -> ConfigDict:
    """A checked, locked copy with every derived field computed. Resolving twice changes nothing.

    Raises:
      UserError: a field that is missing, out of range or at odds with another; a source that has to be counted and
        cannot be opened.
    """
    config = copy.deepcopy(config)  # keeps the types of fields that are None
    if config.train.schedule is None and config.model.head in HEADS:
        config.train.schedule = HEADS[config.model.head].schedule
    fields = flatten(config)
    for key, allowed in CHOICES.items():
        if fields[key] not in allowed:
            raise UserError(f"config.{key} is {fields[key]!r}: give one of {', '.join(allowed)}")
    train, data, model = config.train, config.data, config.model
    counts_epochs = None in (train.steps, train.warmup_steps) and train.epochs is not None
    if data.num_classes is None or (data.num_examples is None and counts_epochs):
        _count(data)
        fields = flatten(config)
    for key in ("data.image_size", "data.num_classes", "tokenizer.patch_size", "model.width", "model.encoder_depth",
                "model.decoder_depth", "model.num_heads", "model.buffer_size", "model.denoiser.depth",
                "model.denoiser.width", "model.diffusion.batch_mul", "train.batch_size", "train.accumulate",
                "checkpoint.every", "checkpoint.keep", "log.every", "sample.batch_size", "sample.max_stages"):
        if fields[key] < 1:
            raise UserError(f"config.{key} is {fields[key]}: give at least 1")
    for key in ("model.attn_dropout", "model.proj_dropout"):
        if not 0.0 <= fields[key] < 1.0:
            raise UserError(f"config.{key} is {fields[key]}: give a share in [0, 1)")
    if not 0.0 <= model.class_dropout <= 1.0:
        raise UserError(f"config.model.class_dropout is {model.class_dropout}: give a share in [0, 1]")
    if not 0.0 < model.mask_ratio.minimum < 1.0 or model.mask_ratio.std <= 0.0:
        raise UserError("config.model.mask_ratio: give a minimum in (0, 1) and a positive std")
    if data.channels not in (1, 3):
        raise UserError(f"config.data.channels is {data.channels}: give 1 or 3")
    if model.width % model.num_heads:
        raise UserError(f"config.model.width {model.width} is not divisible by num_heads {model.num_heads}")
    if int(model.width * model.mlp_ratio) < 1:
        raise UserError(f"config.model.mlp_ratio is {model.mlp_ratio}: give a hidden width of at least 1")
    if model.diffusion.num_steps < 4:
        raise UserError(f"config.model.diffusion.num_steps is {model.diffusion.num_steps}: give at least 4")
    if config.mesh.replicate_below < 0:
        raise UserError(f"config.mesh.replicate_below is {config.mesh.replicate_below}: give at least 0")
    if train.batch_size % train.accumulate:
        raise UserError(f"config.train.batch_size {train.batch_size} is not divisible by train.accumulate "
                        f"{train.accumulate}")
    autoencoder_spec.fill(config.tokenizer, data.channels)
    _resolve_tokenizer_training(config.tokenizer.train, data.image_size)
    tokens, variant = tokens_of(config), VARIANTS[model.variant]
    if HEADS[model.head].discrete and not tokens.num_codes:
        raise UserError(f"config.model.head={model.head} models codes, but the tokens of config.tokenizer.name="
                        f"{config.tokenizer.name} are continuous: choose a tokenizer with a codebook")
    if config.eval.cfg is None:
        config.eval.cfg = config.sample.cfg
    if config.eval.every < 0 or config.eval.num_images < 2 or config.eval.cfg < 0.0:
        raise UserError(f"config.eval: every is {config.eval.every}, num_images {config.eval.num_images} and cfg "
                        f"{config.eval.cfg}: give at least 0, 2 and 0")
    if config.eval.every and not config.eval.reference:
        raise UserError("config.eval.every is set, but config.eval.reference is not: give the file of the real images' "
                        "statistics, which marjax stats makes")
    if config.sample.num_iter is None:
        config.sample.num_iter = min(64, tokens.num_tokens) if variant.many else tokens.num_tokens

    if train.lr is None:
        train.lr = train.base_lr * train.batch_size / 256
    epoch = None if data.num_examples is None else data.num_examples // train.batch_size
    for count, epochs in (("steps", train.epochs), ("warmup_steps", train.warmup_epochs)):
        if train[count] is None:
            if epochs is None or epoch is None:
                raise UserError(f"config has no train.{count}: give it, or data.num_examples and its epochs")
            train[count] = round(epochs * epoch)
    if train.steps < 1 or train.warmup_steps < 0:
        raise UserError(f"config: train.steps {train.steps} must be at least 1, train.warmup_steps "
                        f"{train.warmup_steps} at least 0")
    if train.schedule == "cosine" and train.warmup_steps >= train.steps:
        raise UserError(f"config: the cosine schedule needs train.warmup_steps {train.warmup_steps} below train.steps "
                        f"{train.steps}")
    check_sample(config)
    return config.lock()


def _resolve_tokenizer_training(train: ConfigDict, image_size: int) -> None:
    if train.lr is None:
        train.lr = 4.5e-6 * train.batch_size
    fields, path = flatten(train), "config.tokenizer.train"
    for key, value in fields.items():
        if key in ("batch_size", "steps", "log_every", "checkpoint_every", "scale_images", "disc.layers"):
            if value < 1:
                raise UserError(f"{path}.{key} is {value}: give at least 1")
        elif key in ("lr", "clip"):
            if not value > 0.0:
                raise UserError(f"{path}.{key} is {value}: give a positive number")
        elif key in ("b1", "b2", "ema_decay", "restart_below"):
            if not 0.0 <= value < 1.0:
                raise UserError(f"{path}.{key} is {value}: give a number in [0, 1)")
        elif isinstance(value, int | float) and not value >= 0:
            raise UserError(f"{path}.{key} is {value}: give at least 0")
    if train.disc.weight:
        if train.disc.width < 1 or train.disc.width % autoencoder_spec.GROUPS:
            raise UserError(f"{path}.disc.width is {train.disc.width}: give a multiple of {autoencoder_spec.GROUPS}")
        least = 3 * 2**train.disc.layers  # leaves one patch
        if image_size < least:
            raise UserError(f"{path}.disc.layers is {train.disc.layers}, which needs images of at least {least} "
                            f"pixels, but data.image_size is {image_size}: give fewer layers")
    if train.lpips.weight:
        if not train.lpips.vgg or not train.lpips.linear:
            raise UserError(f"{path}.lpips.weight is {train.lpips.weight}, but its weights are files: give "
                            f"{path}.lpips.vgg (torchvision's vgg16-397923af.pth) and {path}.lpips.linear (the lpips "
                            f"package's vgg.pth)")
        if image_size < 16:
            raise UserError(f"{path}.lpips.weight is {train.lpips.weight}, but LPIPS needs images of at least 16 "
                            f"pixels: set it to 0")


def _count(data: ConfigDict) -> None:
    """Asks the latent cache, or else the source, for the numbers that are not given."""
    if data.cache:
        from marjax.data.latents import read_manifest

        manifest = read_manifest(data.cache)
        num_classes, num_examples = manifest.num_classes, manifest.num_examples
    else:
        from marjax.data.sources import open_source  # imports TFDS, which most configs need not wait for

        source = open_source(data)
        num_classes, num_examples = source.num_classes, len(source)
    for key, number in (("num_classes", num_classes), ("num_examples", num_examples)):
        if data[key] is None:
            data[key] = number


def tokens_of(config: ConfigDict) -> TokenShape:
    """The tokens of the config's images. Raises UserError."""
    data, tokenizer = config.data, config.tokenizer
    num_codes = autoencoder_spec.DEFAULT_NUM_CODES if tokenizer.num_codes is None else tokenizer.num_codes
    named = tokenizer.name in autoencoder_spec.AUTOENCODERS
    return token_shape(tokenizer.name, image_size=data.image_size, channels=data.channels,
                       patch_size=tokenizer.patch_size, num_codes=num_codes,
                       spec=autoencoder_spec.spec_of(tokenizer, data.channels) if named else None)


def check_sample(config: ConfigDict) -> None:
    """Checks `config.sample` against the number of tokens and diffusion steps. Raises UserError."""
    from marjax.heads.diffusion import respaced_timesteps  # imports jax, which `--help` need not

    sample, variant = config.sample, VARIANTS[config.model.variant]
    num_tokens = tokens_of(config).num_tokens
    if not 1 <= sample.num_iter <= num_tokens:
        raise UserError(f"num_iter is {sample.num_iter}, but an image has {num_tokens} tokens: give 1 to {num_tokens}")
    if not variant.many and sample.num_iter != num_tokens:
        raise UserError(f"num_iter is {sample.num_iter}, but variant {config.model.variant!r} predicts one token a "
                        f"step: give {num_tokens}")
    if sample.confidence_order and not (variant.any_next and HEADS[config.model.head].ranks):
        variants = ", ".join(name for name, each in VARIANTS.items() if each.any_next)
        heads = ", ".join(name for name, each in HEADS.items() if each.ranks)
        raise UserError(f"confidence_order needs a head that ranks its tokens ({heads}) and a variant in which any may "
                        f"come next ({variants}), not {config.model.head} with {config.model.variant}")
    if sample.choice_temperature < 0.0:
        raise UserError(f"choice_temperature is {sample.choice_temperature}: give at least 0")
    try:
        respaced_timesteps(config.model.diffusion.num_steps, sample.num_sampling_steps)
    except ValueError as error:
        raise UserError(str(error)) from None
    if sample.temperature < 0.0:
        raise UserError(f"temperature is {sample.temperature}: give at least 0")
    if sample.cfg < 0.0:
        raise UserError(f"cfg is {sample.cfg}: give at least 0 (1 is no guidance)")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _closest(name: str, names: Any) -> str:
    names = list(names)
    by_depth = sorted(names, key=lambda known: -known.count("."))
    leaves = {known.rsplit(".", 1)[-1]: known for known in by_depth}  # of equal ones, the one that lies highest
    match = difflib.get_close_matches(name, names, 1, 0.5)
    match = match or [leaves[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, 1, 0.6)]
    return f"; the closest is {match[0]!r}" if match else ""


def _parse(key: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is tuple:  # of whole numbers: "1,2,4"
            return tuple(int(part) for part in text.split(",")) if text else ()
        return kind(text)
    except (ValueError, KeyError):
        if kind is tuple:
            raise UserError(f"{key}={text!r}: expected whole numbers with commas, such as 1,2,4") from None
        raise UserError(f"{key}={text!r}: expected {kind.__name__}") from None
