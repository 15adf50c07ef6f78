"""Resolving a config: checks, derived values, and sections as dataclasses."""

import dataclasses
import math
import typing

from ml_collections import ConfigDict

from marjax import tokenizers
from marjax.config.overrides import conform, flatten
from marjax.config.schema import CHOICES, MAX_LENGTH, PATHS, RANGES
from marjax.data.config import DataConfig, check_image
from marjax.errors import UserError
from marjax.paths import optional
from marjax.ranges import shown
from marjax.registry import Choices, unknown
from marjax.tokenizers import TokenizerConfig, TokenShape
from marjax.tokenizers import spec as autoencoder_spec
from marjax.variants import HEADS, VARIANTS

if typing.TYPE_CHECKING:
    from marjax.data.source import Source

T = typing.TypeVar("T")


def frozen(section: ConfigDict, cls: type[T], **values: typing.Any) -> T:
    """A dataclass from a section of a config, nested ones from its subsections; `values` take precedence."""
    kinds: dict[str, typing.Any] = typing.get_type_hints(cls)
    for field in dataclasses.fields(typing.cast(typing.Any, cls)):
        if field.init and field.name not in values:
            value, kind = section[field.name], kinds[field.name]
            nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
            values[field.name] = frozen(value, kind) if nested else value
    return cls(**values)


def data_config(config: ConfigDict) -> DataConfig:
    """`config.data` as plain values."""
    return frozen(config.data, DataConfig)


def tokenizer_config(config: ConfigDict) -> TokenizerConfig:
    """`config.tokenizer` as plain values."""
    return frozen(config.tokenizer, TokenizerConfig)


def fill_tokenizer(config: ConfigDict) -> None:
    """Derives the fields of `config.tokenizer` that are None and follow from its name. Raises UserError."""
    filled = autoencoder_spec.fill(tokenizer_config(config), config.data.channels)
    config.tokenizer.update(dataclasses.asdict(filled))


def with_data(config: ConfigDict, data: typing.Any) -> tuple[ConfigDict, "Source"]:
    """A config of data from Python instead of `config.data.source`, and these as a source. Raises UserError."""
    from marjax.data import python_source

    config = conform(config)
    if config.data.cache:
        raise UserError(f"config.data.cache is {config.data.cache}, which replaces data=; give one of the two")
    source = python_source.python_source(data, config.data.num_classes)
    config.data.update(python_source.data_fields(source))
    return config, source


def resolve(config: ConfigDict, *, open_data: bool = True) -> ConfigDict:
    """A checked, locked copy with every derived field computed; idempotent.

    Args:
      config: with the fields of `base()`.
      open_data: whether to open the data to count classes and examples that the config omits. Without it, nothing that
        the config names is opened, which is safe for untrusted configs.

    Raises:
      UserError: an unknown, missing, invalid or contradictory field; a source that cannot be opened for counting.
    """
    config = check_fields(config)
    if config.train.schedule is None:
        config.train.schedule = HEADS[config.model.head].schedule
    train, data, model = config.train, config.data, config.model
    counts_epochs = None in (train.steps, train.warmup_steps) and train.epochs is not None
    if open_data and (data.num_classes is None or (data.num_examples is None and counts_epochs)):
        _count(data)
    if data.num_classes is None:
        raise UserError("config.data.num_classes is missing; set it")
    _check_mask_ratio(model.mask_ratio)
    if model.width % model.num_heads:
        raise UserError(f"config.model.width {model.width} is not divisible by num_heads {model.num_heads}; change one")
    if model.extra and HEADS.is_own(model.head) and VARIANTS.is_own(model.variant):
        raise UserError(
            f"config.model.extra is {shown(model.extra)}, but variant {model.variant} and head {model.head} take no "
            f"extra settings; leave it out, or use a registered one"
        )
    if int(model.width * model.mlp_ratio) < 1:
        raise UserError(f"config.model.mlp_ratio is {model.mlp_ratio}; give a hidden width of at least 1")
    if train.batch_size % train.accumulate:
        raise UserError(
            f"config.train.batch_size {train.batch_size} is not divisible by train.accumulate {train.accumulate}; "
            f"use a multiple of it"
        )
    fill_tokenizer(config)
    _resolve_tokenizer_training(config.tokenizer.train, data.image_size)
    tokens, variant = tokens_of(config), VARIANTS[model.variant]
    if HEADS[model.head].discrete and not tokens.num_codes:
        raise UserError(
            f"config.model.head={model.head} models codes, but the tokens of config.tokenizer.name="
            f"{config.tokenizer.name} are continuous; choose a tokenizer with a codebook"
        )
    if config.eval.cfg is None:
        config.eval.cfg = config.sample.cfg
    if config.eval.every and not config.eval.statistics:
        raise UserError(
            "config.eval.every is set, but config.eval.statistics is not; give the file of dataset statistics from "
            "marjax stats"
        )
    if config.sample.num_iter is None:
        config.sample.num_iter = min(64, tokens.num_tokens) if variant.many else tokens.num_tokens

    if train.lr is None:
        train.lr = train.base_lr * train.batch_size / 256
    epoch = None if data.num_examples is None else data.num_examples // train.batch_size
    for count, epochs in (("steps", train.epochs), ("warmup_steps", train.warmup_epochs)):
        if train[count] is None:
            if epochs is None or epoch is None:
                raise UserError(f"config has no train.{count}; give it, or data.num_examples and its epochs")
            train[count] = round(epochs * epoch)
    _check_ranges(config)  # of what was derived
    if train.schedule == "cosine" and train.warmup_steps >= train.steps:
        raise UserError(
            f"config.train.warmup_steps={train.warmup_steps} is not less than train.steps={train.steps}, as the cosine "
            f"schedule needs; use fewer"
        )
    check_sample(config)
    return config


def check_fields(config: ConfigDict) -> ConfigDict:
    """A locked copy with normalised paths and every single field checked, for partial configs and for `resolve`.

    Raises UserError for a field that is unknown, of the wrong type or out of range.
    """
    config = conform(config)
    for section in (config.train, config.tokenizer.train):
        section.clip = section.clip or None
    fields = flatten(config)
    config.update_from_flattened_dict({key: optional(fields[key], f"config.{key}") for key in PATHS})
    _check_ranges(config)
    for key, allowed in CHOICES.items():
        if fields[key] not in allowed and fields[key] is not None:
            expected = (
                unknown(allowed.kind, fields[key], allowed)
                if isinstance(allowed, Choices)
                else f"give one of {', '.join(allowed)}"
            )
            raise UserError(f"config.{key} is {shown(fields[key])}; {expected}")
    check_image(config.data.image_size, config.data.channels)
    return config


def _check_ranges(config: ConfigDict) -> None:
    for key, value in flatten(config).items():
        if key in RANGES and value is not None:
            numbers = value if isinstance(value, tuple) else (value,)
            if len(numbers) > MAX_LENGTH:
                raise UserError(f"config.{key} has {len(numbers)} numbers; use at most {MAX_LENGTH}")
            for number in numbers:
                RANGES[key].check(f"config.{key}", number)


def _check_mask_ratio(ratio: ConfigDict) -> None:
    """Raises UserError if almost no mass of the truncated normal lies between its ends."""
    low, high = (math.erf((end - ratio.mean) / (ratio.std * math.sqrt(2.0))) for end in (ratio.minimum, 1.0))
    if high - low < 1e-4:
        raise UserError(
            f"config.model.mask_ratio has mean {ratio.mean} and std {ratio.std}, which is hardly ever between minimum "
            f"{ratio.minimum} and 1; use another mean or a larger std"
        )


def _resolve_tokenizer_training(train: ConfigDict, image_size: int) -> None:
    if train.lr is None:
        train.lr = 4.5e-6 * train.batch_size
    path = "config.tokenizer.train"
    if train.disc.weight:
        if train.disc.width % autoencoder_spec.GROUPS:
            raise UserError(f"{path}.disc.width is {train.disc.width}; use a multiple of {autoencoder_spec.GROUPS}")
        least = 3 * 2**train.disc.layers  # leaves one patch
        if image_size < least:
            raise UserError(
                f"{path}.disc.layers is {train.disc.layers}, which needs images of at least {least} "
                f"pixels, but data.image_size is {image_size}; use fewer layers"
            )
    if train.lpips.weight:
        if not train.lpips.vgg or not train.lpips.linear:
            raise UserError(
                f"{path}.lpips.weight is {train.lpips.weight}, but its weights are files; give "
                f"{path}.lpips.vgg (torchvision's vgg16-397923af.pth) and {path}.lpips.linear (the lpips "
                f"package's vgg.pth)"
            )
        if image_size < 16:
            raise UserError(
                f"{path}.lpips.weight is {train.lpips.weight}, but LPIPS needs images of at least 16 "
                f"pixels; set it to 0"
            )


def _count(data: ConfigDict) -> None:
    """Fills in missing numbers of classes and examples from the latent cache or the source."""
    if data.cache:
        from marjax.data.latent_cache.read import read_manifest

        manifest = read_manifest(data.cache)
        num_classes, num_examples = manifest.num_classes, manifest.num_examples
    else:
        from marjax.data.sources import open_source  # imports TFDS, which most configs need not wait for

        source = open_source(frozen(data, DataConfig))
        num_classes, num_examples = source.num_classes, len(source)
    for key, number in (("num_classes", num_classes), ("num_examples", num_examples)):
        if data[key] is None:
            data[key] = number


def tokens_of(config: ConfigDict) -> TokenShape:
    """The tokens of the config's images. Raises UserError."""
    return tokenizers.tokens_of(tokenizer_config(config), config.data.image_size, config.data.channels)


def check_sample(config: ConfigDict) -> None:
    """Checks `config.sample` against the number of tokens and diffusion steps. Raises UserError."""
    from marjax.heads.gaussian_diffusion import respaced_timesteps

    sample, variant = config.sample, VARIANTS[config.model.variant]
    num_tokens = tokens_of(config).num_tokens
    if not 1 <= sample.num_iter <= num_tokens:
        raise UserError(f"num_iter is {sample.num_iter}, but an image has {num_tokens} tokens; use 1 to {num_tokens}")
    if not variant.many and sample.num_iter != num_tokens:
        raise UserError(
            f"num_iter is {sample.num_iter}, but variant {config.model.variant!r} predicts one token a "
            f"step; give {num_tokens}"
        )
    if sample.confidence_order and not (variant.any_next and HEADS[config.model.head].ranks):
        variants = ", ".join(name for name, each in VARIANTS.items() if each.any_next)
        heads = ", ".join(name for name, each in HEADS.items() if each.ranks)
        raise UserError(
            f"confidence_order needs a head that ranks its tokens ({heads}) and a variant in which any may "
            f"come next ({variants}), not {config.model.head} with {config.model.variant}"
        )
    try:
        respaced_timesteps(config.model.diffusion.num_steps, sample.num_sampling_steps)
    except ValueError as error:
        raise UserError(str(error)) from None
