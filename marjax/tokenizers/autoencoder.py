"""The convolutional encoder and decoder of latent diffusion models (Rombach et al. 2022; Esser et al. 2021).

Images and activations are channels last. Parameters are float32; convolutions run in `dtype`, statistics of GroupNorm
and the softmax in float32. Legend: B batch, H x W pixels, h x w latents (H = h times the stride), C channels.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marjax import numerics
from marjax.errors import UserError
from marjax.tokenizers.spec import GROUPS, Spec

# Activations of one full-resolution layer that a device computes at a time: 16 images of 256 x 256 at 128 channels.
_VALUES_AT_ONCE = 2**27


class _Conv(nn.Module):
    """A convolution with bias that keeps the size, or halves it with stride 2."""

    features: int
    size: int
    dtype: Any
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # On the way down the window starts at the pixel itself: one row and column of zeros below and to the right.
        side = self.size // 2
        padding = ((0, 1), (0, 1)) if self.stride == 2 else ((side, side), (side, side))
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (self.size, self.size, x.shape[-1], self.features), jnp.float32
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        # Float32 means float32: without this, TPUs multiply in bfloat16 and newer GPUs in TF32.
        precision = jax.lax.Precision.HIGHEST if jnp.dtype(self.dtype) == jnp.float32 else None
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            jnp.asarray(kernel, self.dtype),
            (self.stride, self.stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )
        return y + jnp.asarray(bias, self.dtype)[None, None, None]


class _Norm(nn.Module):
    """GroupNorm of 32 groups, eps 1e-6."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        wide = x.astype(jnp.float32).reshape(*x.shape[:-1], GROUPS, -1)
        axes = (*range(1, x.ndim - 1), x.ndim)
        centred = wide - jnp.mean(wide, axes, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + 1e-6)
        return (y.reshape(x.shape) * scale[None, None, None] + bias[None, None, None]).astype(self.dtype)


class ResBlock(nn.Module):
    """Two convolutions, each after GroupNorm and SiLU, with a residual, projected 1 x 1 if the channels change."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _Conv(self.features, 3, self.dtype, name="conv1")(nn.silu(_Norm(self.dtype, name="norm1")(x)))
        y = _Conv(self.features, 3, self.dtype, name="conv2")(nn.silu(_Norm(self.dtype, name="norm2")(y)))
        if x.shape[-1] != self.features:
            x = _Conv(self.features, 1, self.dtype, name="shortcut")(x)
        return x + y


class AttentionBlock(nn.Module):
    """Single-head attention over all positions, with a residual; memory is quadratic in their number."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        normed = _Norm(self.dtype, name="norm")(x)
        q, k, v = (_Conv(c, 1, self.dtype, name=name)(normed).reshape(b, h * w, c) for name in ("q", "k", "v"))
        precision = jax.lax.Precision.HIGHEST if jnp.dtype(self.dtype) == jnp.float32 else None
        scores = jnp.einsum("bqc,bkc->bqk", q, k, precision=precision, preferred_element_type=jnp.float32)
        shares = jax.nn.softmax(scores * c**-0.5, axis=-1).astype(self.dtype)
        y = jnp.einsum("bqk,bkc->bqc", shares, v, precision=precision).reshape(x.shape)
        return x + _Conv(c, 1, self.dtype, name="proj_out")(y)


class _Half(nn.Module):
    """Shared parts of encoder and decoder. With `remat`, the backward pass recomputes every block from its input."""

    spec: Spec
    dtype: Any
    remat: bool = False

    def res_block(self, level: int, name: str) -> Any:
        block: Any = nn.remat(ResBlock) if self.remat else ResBlock
        return block(self.spec.width * self.spec.channel_mults[level], self.dtype, name=name)

    def attention(self, name: str) -> Any:
        block: Any = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        return block(self.dtype, name=name)

    def middle(self, x: jax.Array) -> jax.Array:
        last = len(self.spec.channel_mults) - 1
        x = self.attention("mid_attn")(self.res_block(last, "mid_block_1")(x))
        return self.res_block(last, "mid_block_2")(x)

    def out(self, x: jax.Array, features: int) -> jax.Array:
        return _Conv(features, 3, self.dtype, name="conv_out")(nn.silu(_Norm(self.dtype, name="norm_out")(x)))


class Encoder(_Half):
    """(B, h, w, latent_channels), twice as many channels for KL, from (B, H, W, in_channels)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        x = _Conv(spec.width, 3, self.dtype, name="conv_in")(x)
        for level in range(len(spec.channel_mults)):
            for i in range(spec.num_res_blocks):
                x = self.res_block(level, f"down_{level}_block_{i}")(x)
                if spec.has_attention("encoder", level):
                    x = self.attention(f"down_{level}_attn_{i}")(x)
            if level < len(spec.channel_mults) - 1:
                x = _Conv(x.shape[-1], 3, self.dtype, stride=2, name=f"down_{level}_downsample")(x)
        return self.out(self.middle(x), spec.latent_channels * (1 if spec.num_codes else 2))


class Decoder(_Half):
    """(B, H, W, in_channels) from (B, h, w, latent_channels)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        x = _Conv(spec.width * spec.channel_mults[-1], 3, self.dtype, name="conv_in")(x)
        x = self.middle(x)
        for level in reversed(range(len(spec.channel_mults))):
            for i in range(spec.num_res_blocks + 1):
                x = self.res_block(level, f"up_{level}_block_{i}")(x)
                if spec.has_attention("decoder", level):
                    x = self.attention(f"up_{level}_attn_{i}")(x)
            if level:
                x = _Conv(x.shape[-1], 3, self.dtype, name=f"up_{level}_upsample")(_twice(x))
        return self.out(x, spec.in_channels)


class Autoencoder(nn.Module):
    """Encoder, decoder, the 1 x 1 convolutions between them and, for VQ, the codebook (num_codes, embed_dim)."""

    spec: Spec
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        spec, halves = self.spec, 1 if self.spec.num_codes else 2
        self.encoder = Encoder(spec, self.dtype, self.remat)
        self.quant_conv = _Conv(spec.embed_dim * halves, 1, self.dtype)
        self.post_quant_conv = _Conv(spec.latent_channels, 1, self.dtype)
        self.decoder = Decoder(spec, self.dtype, self.remat)
        if spec.num_codes:
            # Codes start close together, so that none is the nearest to everything (van den Oord 2017).
            bound = 1.0 / spec.num_codes
            self.codebook = self.param(
                "codebook",
                lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound),
                (spec.num_codes, spec.embed_dim),
            )

    def encode(self, image: jax.Array) -> jax.Array:
        """Encoder output, float32 (B, h, w, C), of float images (B, H, W, in_channels) in [-1, 1].

        C is embed_dim for VQ, and 2 * embed_dim for KL: means, then log variances. Raises UserError for images with
        another number of channels, or sides that the stride does not divide.
        """
        _, height, width, channels = image.shape
        stride = self.spec.stride
        if channels != self.spec.in_channels or height % stride or width % stride:
            raise UserError(
                f"images are {height} x {width} with {channels} channels, but the tokenizer takes "
                f"{self.spec.in_channels} and sides that {stride} divides; change config.data"
            )
        return self.quant_conv(self.encoder(image)).astype(jnp.float32)

    def decode(self, latent: jax.Array) -> jax.Array:
        """Images, float32 (B, H, W, in_channels), not clipped, from float latents (B, h, w, embed_dim)."""
        return self.decoder(self.post_quant_conv(latent)).astype(jnp.float32)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Calls every submodule, for `init`."""
        return self.decode(self.encode(image)[..., : self.spec.embed_dim])


def init_params(spec: Spec, key: jax.Array) -> Any:
    """Fresh parameters to train from, float32."""
    image = jnp.zeros((1, spec.stride, spec.stride, spec.in_channels))
    return jax.jit(Autoencoder(spec).init)(key, image)["params"]


@functools.cache
def abstract_params(spec: Spec) -> Any:
    """The parameters' shapes, without computing anything."""
    return jax.eval_shape(lambda: init_params(spec, numerics.key(0)))


def rows_at_once(spec: Spec, image_pixels: int) -> int:
    """The number of images of `image_pixels` that a device encodes or decodes at a time."""
    return max(1, _VALUES_AT_ONCE // (image_pixels * spec.width))


def _twice(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling by 2."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
