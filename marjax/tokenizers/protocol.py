"""The contract of a tokenizer, and the conversion of latents to tokens.

Shapes: B batch, h x w latent grid of C channels, p patch side, L tokens, D token dimension.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from marjax.errors import UserError

if TYPE_CHECKING:  # a config, which needs these, does without JAX
    import jax


class Tokenizer(Protocol):
    """Images to latents and back. `params` are its frozen weights, a pytree passed into jitted code as an argument.

    A registered class (`marjax.register`) also has `stride`, pixels per side of a latent; a classmethod `from_config`
    that opens one from a `tokenizers.config.TokenizerConfig`, whose `path` it may read; a static method
    `latent_channels(channels)` where latents have other channels than the image; and `discrete = True` where tokens
    are codes, `config.tokenizer.num_codes` of them.
    """

    params: Any
    checksum: str  # of the weights; "" where there are none
    scale: float  # multiplies latents

    def encode(self, params: Any, image: "jax.Array", key: "jax.Array") -> "jax.Array":
        """Scaled latents, float32 (B, h, w, C), from images, float32 (B, H, W, 1 or 3) in [-1, 1].

        `key` is for tokenizers that draw from a posterior.
        """
        ...

    def decode(self, params: Any, latent: "jax.Array") -> "jax.Array":
        """Images, float32 (B, H, W, 1 or 3), not clipped, from scaled latents."""
        ...

    def codebook(self, params: Any) -> "jax.Array | None":
        """All tokens that `encode` can return, float32 (K, D); None if tokens are continuous."""
        ...


@runtime_checkable
class Cacheable(Tokenizer, Protocol):
    """A tokenizer whose network outputs can be cached: `encode` is `latents` of `moments`."""

    def moments(self, params: Any, image: "jax.Array") -> "jax.Array":
        """The input of `latents`, float32 (B, h, w, M) or int32 (B, h, w), from images (B, H, W, 1 or 3) in [-1, 1]."""
        ...

    def latents(self, params: Any, moments: "jax.Array", key: "jax.Array") -> "jax.Array":
        """Scaled latents, float32 (B, h, w, C), from moments of any float dtype or int32."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenShape:
    """The grid of tokens of an image: `height` x `width` patches of `patch` x `patch` latents of `channels`.

    `num_codes` is how many different tokens there are, 0 for continuous ones.
    """

    height: int
    width: int
    channels: int
    patch: int
    num_codes: int = 0

    @classmethod
    def of_images(cls, image_size: int, stride: int, channels: int, patch: int, num_codes: int = 0) -> "TokenShape":
        """The grid of a square image under a tokenizer of that stride.

        Raises:
          ValueError: stride x patch does not divide the image.
        """
        if image_size < 1 or patch < 1 or image_size % (stride * patch):
            raise ValueError(
                f"image size {image_size} is not divisible by the tokenizer's stride {stride} times the "
                f"patch size {patch}; use a multiple of {stride * max(patch, 1)}"
            )
        side = image_size // stride // patch
        return cls(side, side, channels, patch, num_codes)

    @property
    def num_tokens(self) -> int:
        return self.height * self.width

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch**2

    def patchify(self, latent_BxhxwxC: "jax.Array") -> "jax.Array":
        """Tokens in raster order, (B, L, D), each ordered (channel, row, column) as the reference's weights expect."""
        b, p = latent_BxhxwxC.shape[0], self.patch
        x = latent_BxhxwxC.reshape(b, self.height, p, self.width, p, self.channels)
        return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, self.num_tokens, self.token_dim)

    def unpatchify(self, tokens_BxLxD: "jax.Array") -> "jax.Array":
        """The inverse of `patchify`: (B, h, w, C)."""
        b, p = tokens_BxLxD.shape[0], self.patch
        x = tokens_BxLxD.reshape(b, self.height, self.width, self.channels, p, p)
        return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, self.height * p, self.width * p, self.channels)


def missing_file(name: str, path: str, how: str) -> UserError:
    """The error about a tokenizer whose file is not given or does not exist; `how` to make the file."""
    what = f"={path} does not exist" if path else f" is empty, but tokenizer {name!r} is a file"
    return UserError(
        f"config.tokenizer.path{what}; give --config.tokenizer.path (--tokenizer_path when sampling); {how}"
    )


def check_checksum(trained: str | None, opened: str, kind: str, where: str) -> None:
    """Raises UserError if the tokenizer opened from `where` is not the one that a model was trained with.

    `trained` is the checksum in the model's config, None or "" for a new model; `kind` is such as "codebook".
    """
    if trained and trained != opened:
        raise UserError(
            f"{where} has checksum {opened[:12]}, but the model was trained with {kind} {trained[:12]}; give the path "
            f"of that one (--config.tokenizer.path, or --tokenizer_path when sampling)"
        )
