"""What the reference calls its models' settings, and what the shapes of a checkpoint's tensors tell of them.

A checkpoint of the reference says most of what a config says: widths and depths by its shapes, the rest by the
arguments of its training, if they are there; the released sizes fill in for these.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax.config.schema import NONE_IS_OFF
from marjax.errors import UserError, shortened
from marjax.heads.gaussian_diffusion import cosine_schedule
from marjax.interop import names
from marjax.interop.pytorch import Tensor
from marjax.tokenizers.autoencoder_names import count_layers
from marjax.tokenizers.spec import AUTOENCODERS, Spec
from marjax.variants import VARIANTS

# Argument of the reference -> field of the config. `cfg` and `num_iter` are of the evaluation during training.
_ARGUMENTS: dict[str, tuple[str, type]] = {
    "seed": ("seed", int),
    "mask_ratio_min": ("model.mask_ratio.minimum", float),
    "label_drop_prob": ("model.class_dropout", float),
    "attn_dropout": ("model.attn_dropout", float),
    "proj_dropout": ("model.proj_dropout", float),
    "diffusion_batch_mul": ("model.diffusion_batch_mul", int),
    "blr": ("train.base_lr", float),
    "min_lr": ("train.min_lr", float),
    "lr_schedule": ("train.schedule", str),
    "weight_decay": ("train.weight_decay", float),
    "grad_clip": ("train.clip", float),
    "ema_rate": ("train.ema_decay", float),
    "num_iter": ("sample.num_iter", int),
    "num_sampling_steps": ("sample.num_sampling_steps", str),
    "cfg": ("sample.cfg", float),
    "cfg_schedule": ("sample.cfg_schedule", str),
    "temperature": ("sample.temperature", float),
}
_EPOCHS = {"epochs": "train.epochs", "warmup_epochs": "train.warmup_epochs"}
_TABLE = re.compile(
    r"betas|alphas_cumprod(_prev|_next)?|(sqrt|log)_(one_minus|recip|recipm1)?_?alphas_cumprod|"
    r"posterior_(variance|log_variance_clipped|mean_coef[12])"
)
_IMAGENET = dict(source="tfds:imagenet2012", split="train", num_examples=1_281_167, flip=True, workers=8)
_NAMES = {(16, 16): "kl16", (8, 4): "kl8", (1, 1): "pixels", (1, 3): "pixels"}


def tokenizer_name(spec: Spec) -> str:
    """The name under which a config asks for latents, not codes, of this network."""
    for name, kind in AUTOENCODERS.items():
        if kind.preset is not None and not kind.discrete and not kind.preset.differences(spec):
            return name
    return "vq_continuous" if spec.num_codes else "kl"


def config_of(
    shapes: Mapping[str, tuple[int, ...]], arguments: Mapping[str, Any], spec: Spec | None, overrides: Mapping[str, Any]
) -> ConfigDict:
    """The resolved config of a checkpoint of the reference.

    Args:
      shapes: of its tensors, by their PyTorch names.
      arguments: those of its training, such as `args` in the file; {} if they are not known.
      spec: of its autoencoder, where that is at hand.
      overrides: fields of the config, as `config.apply_overrides` takes them; they have the last word.

    Raises:
      UserError: it is no such model, the arguments contradict the shapes, or something cannot be told: the error then
        names the field to set.
    """
    config = config_lib.base()
    model = config.model
    width, token_dim = _shape(shapes, "z_proj.weight", 2)
    num_tokens = _shape(shapes, "diffusion_pos_embed_learned", 3)[1]
    hidden = _shape(shapes, "encoder_blocks.0.mlp.fc1.weight", 2)[0]
    classes = _shape(shapes, "class_emb.weight", 2)[0]
    decoder_width = _shape(shapes, "decoder_embed.weight", 2)[0]
    if decoder_width != width:
        raise UserError(
            f"its decoder is {decoder_width} wide and its encoder {width}: this program has one width for both"
        )
    ratio = hidden / width
    model.update(
        variant="mar",
        head="diffusion",
        width=width,
        encoder_depth=_count(shapes, "encoder_blocks"),
        decoder_depth=_count(shapes, "decoder_blocks"),
        buffer_size=_shape(shapes, "encoder_pos_embed_learned", 3)[1] - num_tokens,
        # So that int(width * mlp_ratio) is the hidden width, whatever is lost in rounding.
        mlp_ratio=ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
    )
    model.denoiser.update(
        depth=_count(shapes, "diffloss.net.res_blocks"), width=_shape(shapes, "diffloss.net.input_proj.weight", 2)[0]
    )
    config.data.update(num_classes=classes)
    _set_tokenizer(config, token_dim, num_tokens, arguments, spec, overrides)

    given: dict[str, Any] = {}
    for name, (key, kind) in _ARGUMENTS.items():
        if arguments.get(name) is not None:
            given[key] = _typed(name, arguments[name], kind)
        elif name in arguments and key in NONE_IS_OFF:
            given[key] = None
    size = next(
        (
            name
            for name, each in config_lib.MODEL_SIZES.items()
            if (each["width"], each["depth"], each["depth"]) == (width, model.encoder_depth, model.decoder_depth)
        ),
        None,
    )
    _set_heads(model, size, arguments, overrides)
    if classes == 1000:
        config.data.update(_IMAGENET)
        # The released models were trained for 800 epochs, 100 of them warming up.
        given |= {"train.epochs": 800.0, "train.warmup_epochs": 100.0}
        given |= {key: _typed(name, arguments[name], float) for name, key in _EPOCHS.items() if name in arguments}
    else:
        # Neither the data nor the number of steps is known; both only matter where one trains.
        config.data.source = ""
        given |= {"train.steps": 1, "train.warmup_steps": 0}
    if "batch_size" in arguments and "world_size" in arguments:
        given["train.batch_size"] = _typed("batch_size", arguments["batch_size"], int) * _typed(
            "world_size", arguments["world_size"], int
        )
    if size and classes == 1000 and num_tokens == 256:
        released = config_lib.MODEL_SIZES[size]
        if (released["denoiser_depth"], released["denoiser_width"]) == (model.denoiser.depth, model.denoiser.width):
            given |= {"sample.num_iter": 256, "sample.cfg": released["cfg"], "sample.temperature": 1.0}
    return config_lib.resolve(config_lib.apply_overrides(config, given | dict(overrides)), open_data=False)


def without_tables(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what forward passes look up in: buffers, which are no weights.

    Those are integers under names that the reference does not have, and the tables of the noise schedule if they are
    those of the reference's; of another schedule they are kept, for such weights would not be sampled as trained.
    """
    kept = {name: each for name, each in tensors.items() if each.dtype.kind not in "iub" or names.is_known(name)}
    for name in [name for name in kept if name.rpartition(".")[2] == "betas"][:1]:
        prefix, betas = name.removesuffix("betas"), cosine_schedule(1000).betas
        if kept[name].shape == betas.shape and np.allclose(np.asarray(kept[name], np.float64), betas, rtol=1e-3):
            kept = {
                other: each
                for other, each in kept.items()
                if not (other.startswith(prefix) and _TABLE.fullmatch(other.removeprefix(prefix)))
            }
    return kept


def arguments_of(config: ConfigDict) -> dict[str, Any]:
    """The reference's arguments for a resolved config: what `config_of` reads.

    Raises:
      UserError: the reference has no such model.
    """
    model, fields, tokens = config.model, config_lib.flatten(config), config_lib.tokens_of(config)
    variant = VARIANTS[model.variant]
    if variant.attention != "bidirectional" or model.head != "diffusion":
        raise UserError(
            f"the reference has names for variant mar with head diffusion only, not for variant "
            f"{model.variant} with head {model.head}: there is no file that it could read"
        )
    if model.diffusion.num_steps != 1000:
        raise UserError(
            f"config.model.diffusion.num_steps is {model.diffusion.num_steps}, but the reference always "
            f"has 1000: it would not sample from these weights as they were trained"
        )
    arguments = {name: fields[key] for name, (key, _) in _ARGUMENTS.items()}
    return arguments | dict(
        img_size=config.data.image_size,
        vae_stride=config.data.image_size // (tokens.height * tokens.patch),
        vae_embed_dim=tokens.channels,
        patch_size=tokens.patch,
        class_num=config.data.num_classes,
        encoder_embed_dim=model.width,
        encoder_depth=model.encoder_depth,
        encoder_num_heads=model.num_heads,
        decoder_embed_dim=model.width,
        decoder_depth=model.decoder_depth,
        decoder_num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        buffer_size=model.buffer_size,
        diffloss_d=model.denoiser.depth,
        diffloss_w=model.denoiser.width,
    )


def _set_heads(model: ConfigDict, size: str | None, arguments: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    heads = [
        _typed(name, arguments[name], int) for name in ("encoder_num_heads", "decoder_num_heads") if name in arguments
    ]
    if len(set(heads)) > 1:
        raise UserError(
            f"its encoder has {heads[0]} attention heads and its decoder {heads[1]}: this program has one "
            f"number for both"
        )
    if heads:
        model.num_heads = heads[0]
    elif size:
        model.num_heads = config_lib.MODEL_SIZES[size]["num_heads"]
    elif "model.num_heads" not in overrides:
        raise UserError(
            f"the number of attention heads cannot be told from shapes, and {model.width} wide with "
            f"{model.encoder_depth} + {model.decoder_depth} blocks is none of the released sizes: give "
            f"--config.model.num_heads=N"
        )


def _set_tokenizer(
    config: ConfigDict,
    token_dim: int,
    num_tokens: int,
    arguments: Mapping[str, Any],
    spec: Spec | None,
    overrides: Mapping[str, Any],
) -> None:
    """Tokenizer, patch and image size: tokens have channels * patch^2 values, and lie in a square."""
    told = {
        name: _typed(name, arguments[name], int)
        for name in ("vae_embed_dim", "vae_stride", "patch_size", "img_size")
        if name in arguments
    }
    channels, stride = told.get("vae_embed_dim", 16), told.get("vae_stride", 16)
    if spec is not None:
        if (told.get("vae_embed_dim", spec.embed_dim), told.get("vae_stride", spec.stride)) != (
            spec.embed_dim,
            spec.stride,
        ):
            raise UserError(
                f"it was trained on latents of {channels} channels at stride {stride}, but the tokenizer's "
                f"have {spec.embed_dim} at stride {spec.stride}: give the tokenizer that it was trained "
                f"with"
            )
        channels, stride = spec.embed_dim, spec.stride
    patch, side = math.isqrt(token_dim // channels) if channels > 0 else 0, math.isqrt(num_tokens)
    if channels * patch**2 != token_dim or told.get("patch_size", patch) != patch or side**2 != num_tokens:
        raise UserError(
            f"it has {num_tokens} tokens of {token_dim} values, which are no square of patches of "
            f"{told.get('patch_size', 'p')} x {told.get('patch_size', 'p')} latents of {channels} "
            f"channels: give the autoencoder that it was trained with by --tokenizer FILE"
        )
    image_size = side * patch * stride
    if told.get("img_size", image_size) != image_size:
        raise UserError(
            f"its arguments say images of {told['img_size']} pixels, but {side} x {side} tokens of "
            f"{patch} x {patch} latents at stride {stride} make {image_size}: the file contradicts itself"
        )
    name = tokenizer_name(spec) if spec is not None else _NAMES.get((stride, channels))
    if name is None and "tokenizer.name" not in overrides:
        raise UserError(
            f"latents of {channels} channels at stride {stride} are of no autoencoder that has a name: "
            f"give its file by --tokenizer FILE"
        )
    config.tokenizer.update(name=name or overrides["tokenizer.name"], patch_size=patch)
    if name == "pixels":
        config.tokenizer.checksum = ""  # as training writes it
    if name in ("kl", "vq_continuous"):
        assert spec is not None
        fields = spec.to_json()
        config.tokenizer.num_codes = fields.pop("num_codes") or None
        config.tokenizer.autoencoder.update(fields)
    config.data.update(image_size=image_size)
    config.data.update(channels=spec.in_channels if spec else channels if name == "pixels" else 3)


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, rank: int) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != rank or 0 in shapes[name]:
        what = f"has shape {shapes[name]}" if name in shapes else "is missing"
        if any(each.startswith("encoder.conv_in.") for each in shapes):
            raise UserError("it is an autoencoder, not a MAR model: give it by --tokenizer")
        raise UserError(
            f"it is no MAR model of the reference: {name} {what} (there are {len(shapes)} tensors, such as "
            f"{', '.join(map(shortened, sorted(shapes)[:3])) or 'none'})"
        )
    return shapes[name]


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    numbers = [name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{prefix}.")]
    return count_layers([number for number in numbers if number.isdecimal()])


def _typed(name: str, value: Any, kind: type) -> Any:
    """An argument of the file as its kind; what a stranger's file holds is not trusted to be one."""
    if type(value) is int and abs(value) < 1 << 53 and kind in (str, float):
        value = kind(value)
    if (
        type(value) is not kind
        or (isinstance(value, str) and len(value) > 100)
        or (isinstance(value, int | float) and not abs(value) < 1 << 53)
    ):  # nor if it is not a number
        raise UserError(f"its argument {name} is no {kind.__name__}: the file is damaged or of another program")
    return value
