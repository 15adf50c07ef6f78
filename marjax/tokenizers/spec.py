"""The specification of an autoencoder, the named networks, and their selection by a config. Does not import JAX.

Sources: Rombach et al. 2022 (LDM; KL-f8 and VQ-f16), Li et al. 2024, appendix B (KL-16).
"""

import dataclasses
from typing import Any

from marjax.errors import UserError
from marjax.tokenizers.config import TokenizerConfig

GROUPS = 32  # of every GroupNorm
DEFAULT_NUM_CODES = 512
_MAX_SIZE, _MAX_LEVELS, _MAX_CODES = 1 << 16, 12, 1 << 24
POSTERIORS = ("sample", "mean")  # of a KL tokenizer


@dataclasses.dataclass(frozen=True)
class Spec:
    """The architecture of an autoencoder.

    A level is a resolution of the network, each half of the one before. The levels with attention follow from
    `resolution`, a nominal image size, not from the actual images.

    Attributes:
      in_channels: of the image.
      width: channels of the first layer, a multiple of the 32 groups of GroupNorm.
      channel_mults: channels of every level, in multiples of `width`.
      num_res_blocks: on every level of the encoder; the decoder has one more.
      latent_channels: between the encoder or decoder and the 1 x 1 convolution beside it (`z_channels` of LDM).
      embed_dim: channels of the latents.
      encoder_attn_resolutions: sizes of levels, from `resolution`, with attention after every block.
      decoder_attn_resolutions: of the decoder. Both also have attention in the middle.
      resolution: nominal image size.
      num_codes: of a VQ network; 0 for a KL network.

    Raises:
      ValueError: an invalid network.
    """

    in_channels: int = 3
    width: int = 128
    channel_mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_channels: int = 16
    embed_dim: int = 16
    encoder_attn_resolutions: tuple[int, ...] = ()
    decoder_attn_resolutions: tuple[int, ...] = ()
    resolution: int = 256
    num_codes: int = 0

    def __post_init__(self) -> None:
        for name in ("in_channels", "width", "num_res_blocks", "latent_channels", "embed_dim", "resolution"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MAX_SIZE:
                raise ValueError(f"{name} is {value!r}; use 1 to {_MAX_SIZE}")
        mults = self.channel_mults
        if not 1 <= len(mults) <= _MAX_LEVELS or any(
            type(mult) is not int or not 1 <= mult <= _MAX_SIZE for mult in mults
        ):
            raise ValueError(
                f"channel_mults is {mults[:_MAX_LEVELS]!r}; use at least 1 for every level, for at most {_MAX_LEVELS}"
            )
        if not 0 <= self.num_codes <= _MAX_CODES:
            raise ValueError(f"num_codes is {self.num_codes}; use 1 to {_MAX_CODES}, or 0 for a KL network")
        if self.width % GROUPS:
            raise ValueError(f"width is {self.width}; use a multiple of {GROUPS}, the groups of every GroupNorm")
        if self.resolution % self.stride:
            raise ValueError(
                f"resolution {self.resolution} is not divisible by {self.stride}, the stride of "
                f"{len(self.channel_mults)} levels; use a multiple of it"
            )
        for name in ("encoder_attn_resolutions", "decoder_attn_resolutions"):
            odd = [size for size in getattr(self, name) if size not in self.level_resolutions]
            if odd:
                raise ValueError(
                    f"{name} has {odd[0]}, but the levels of a network of resolution {self.resolution} "
                    f"are {', '.join(map(str, self.level_resolutions))}; use any of these"
                )

    @property
    def stride(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.channel_mults) - 1)

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        return tuple(self.resolution // 2**level for level in range(len(self.channel_mults)))

    @property
    def kind(self) -> str:
        return "vq" if self.num_codes else "kl"

    def has_attention(self, half: str, level: int) -> bool:
        """Whether a level of the "encoder" or "decoder" has attention."""
        return self.level_resolutions[level] in getattr(self, f"{half}_attn_resolutions")

    def differences(self, other: "Spec") -> list[str]:
        """The differences of two networks, one string each; resolutions are compared by the levels with attention."""
        lines = []
        for field in dataclasses.fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if field.name == "resolution":
                continue
            if field.name.endswith("_attn_resolutions"):
                half = field.name.removesuffix("_attn_resolutions")
                mine, others = (
                    [i for i in range(len(spec.channel_mults)) if spec.has_attention(half, i)] for spec in (self, other)
                )
                if mine != others:
                    lines.append(f"{half} attention at levels {mine} instead of {others}")
            elif mine != others:
                lines.append(f"{field.name} {mine} instead of {others}")
        return lines

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Spec":
        """Raises ValueError or TypeError for an unknown field or an invalid network."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**given)


@dataclasses.dataclass(frozen=True)
class Kind:
    """The kind of a named tokenizer."""

    vq: bool  # else KL
    discrete: bool = False  # tokens are codes, not a VQ network's latents before quantization
    preset: Spec | None = None  # the network, if the name determines it
    scale: float | None = None  # multiplies latents, if the name determines it


_KL16 = Spec(latent_channels=16, embed_dim=16, encoder_attn_resolutions=(16,))
_KL8 = Spec(channel_mults=(1, 2, 4, 4), latent_channels=4, embed_dim=4)
_VQ16 = Spec(
    latent_channels=8, embed_dim=8, encoder_attn_resolutions=(16,), decoder_attn_resolutions=(16,), num_codes=16384
)

# Codes are never scaled: the tokens of a discrete tokenizer are rows of its codebook.
AUTOENCODERS = {
    "kl": Kind(vq=False),
    "kl8": Kind(vq=False, preset=_KL8, scale=0.18215),
    "kl16": Kind(vq=False, preset=_KL16, scale=0.2325),
    "vq": Kind(vq=True, discrete=True, scale=1.0),
    "vq_continuous": Kind(vq=True),
    "vq16": Kind(vq=True, discrete=True, preset=_VQ16, scale=1.0),
    "vq16_continuous": Kind(vq=True, preset=_VQ16),
}

# Defaults of networks without a preset; as in LDM, embed_dim follows latent_channels.
_FREE = {
    False: dataclasses.replace(_KL16, encoder_attn_resolutions=()),
    True: dataclasses.replace(
        _VQ16, encoder_attn_resolutions=(), decoder_attn_resolutions=(), num_codes=DEFAULT_NUM_CODES
    ),
}


def spec_of(tokenizer: TokenizerConfig, channels: int | None = None) -> Spec:
    """The network of a tokenizer whose name is in AUTOENCODERS.

    Args:
      tokenizer: the settings; fields of `autoencoder` that are None follow from the name.
      channels: of the images, if known.

    Raises:
      UserError: an invalid network, or a field that contradicts the name's preset.
    """
    kind, name = AUTOENCODERS[tokenizer.name], tokenizer.name
    given = dataclasses.asdict(tokenizer.autoencoder) | {"num_codes": tokenizer.num_codes if kind.vq else None}
    given = {each.name: given[each.name] for each in dataclasses.fields(Spec) if given[each.name] is not None}
    if kind.vq and tokenizer.num_codes is not None and tokenizer.num_codes < 1:
        raise UserError(f"config.tokenizer.num_codes={tokenizer.num_codes} is too small; use at least 1")
    if kind.preset is None:
        if channels is not None:
            given.setdefault("in_channels", channels)
        if "latent_channels" in given:
            given.setdefault("embed_dim", given["latent_channels"])
        try:
            spec = dataclasses.replace(_FREE[kind.vq], **given)
        except ValueError as error:
            raise UserError(f"config.tokenizer.autoencoder: {error}") from None
    else:
        spec = kind.preset
        for field, value in given.items():
            if value != getattr(spec, field):
                path = "" if field == "num_codes" else "autoencoder."
                raise UserError(
                    f"config.tokenizer.{path}{field} is {value}, but {name} has {getattr(spec, field)}: "
                    f"leave it out, or set config.tokenizer.name={name.replace('16', '').replace('8', '')}"
                )
    if channels is not None and spec.in_channels != channels:
        raise UserError(
            f"config.data.channels is {channels}, but tokenizer {name} takes {spec.in_channels}; set it to "
            f"{spec.in_channels} (grey images are repeated, colour images become grey)"
        )
    return spec


def fill(tokenizer: TokenizerConfig, channels: int) -> TokenizerConfig:
    """The settings with the fields of its network that are None derived. Raises UserError."""
    if tokenizer.name not in AUTOENCODERS:
        num_codes = DEFAULT_NUM_CODES if tokenizer.num_codes is None else tokenizer.num_codes
        return dataclasses.replace(tokenizer, num_codes=num_codes)
    kind, fields = AUTOENCODERS[tokenizer.name], spec_of(tokenizer, channels).to_json()
    num_codes, scale = fields.pop("num_codes"), tokenizer.autoencoder.scale
    if scale is not None and not scale > 0.0:
        raise UserError(f"config.tokenizer.autoencoder.scale={scale} is not positive; use a positive number")
    if scale not in (None, 1.0) and kind.discrete:
        raise UserError(
            f"config.tokenizer.autoencoder.scale is {scale}, but codes of {tokenizer.name} are not scaled; leave it out"
        )
    return dataclasses.replace(
        tokenizer,
        num_codes=num_codes if kind.vq else tokenizer.num_codes,
        autoencoder=dataclasses.replace(tokenizer.autoencoder, **fields),
    )
