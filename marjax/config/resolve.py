"""From a config as given to one that is checked, complete and locked."""

from ml_collections import ConfigDict

from marjax.config.overrides import conform, flatten
from marjax.config.schema import CHOICES
from marjax.errors import UserError
from marjax.ranges import shown
from marjax.tokenizers import TokenShape, token_shape
from marjax.tokenizers import spec as autoencoder_spec
from marjax.variants import HEADS, VARIANTS


def resolve(config: ConfigDict, *, open_data: bool = True) -> ConfigDict:
    """A checked, locked copy with every derived field computed. Resolving twice changes nothing.

    Args:
      config: with the fields of `base()`.
      open_data: whether to count classes and examples where the config does not say how many there are. Without it
        nothing that the config names is opened, as must be with the config of a stranger.

    Raises:
      UserError: a field that is unknown, missing, out of range or at odds with another; a source that has to be
        counted and cannot be opened.
    """
    config = conform(config)
    if config.train.schedule is None and config.model.head in HEADS:
        config.train.schedule = HEADS[config.model.head].schedule
    for section in (config.train, config.tokenizer.train):
        section.clip = section.clip or None
    fields = flatten(config)
    for key, allowed in CHOICES.items():
        if fields[key] not in allowed:
            raise UserError(f"config.{key} is {shown(fields[key])}: give one of {', '.join(allowed)}")
    train, data, model = config.train, config.data, config.model
    counts_epochs = None in (train.steps, train.warmup_steps) and train.epochs is not None
    if open_data and (data.num_classes is None or (data.num_examples is None and counts_epochs)):
        _count(data)
        fields = flatten(config)
    if data.num_classes is None:
        raise UserError("config.data.num_classes is missing: set it")
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
    return config


def _resolve_tokenizer_training(train: ConfigDict, image_size: int) -> None:
    if train.lr is None:
        train.lr = 4.5e-6 * train.batch_size
    fields, path = flatten(train), "config.tokenizer.train"
    for key, value in fields.items():
        if key in ("batch_size", "steps", "log_every", "checkpoint_every", "scale_images", "disc.layers"):
            if value < 1:
                raise UserError(f"{path}.{key} is {value}: give at least 1")
        elif key == "lr":
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
