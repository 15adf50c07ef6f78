"""Layers shared by all networks: Dense, LayerNorm, dropout and table lookup.

Parameters are float32 and carry logical axis names (see `marjax/sharding.py`); matmuls run in `dtype`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., Any]
normal_002 = nn.initializers.normal(0.02)
embedding_init = nn.with_logical_partitioning(normal_002, (None, "embed"))
vector_init = nn.with_logical_partitioning(normal_002, ("embed",))


def parameter(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> jax.Array:
    """Declares a float32 parameter."""
    value: Any = module.param(name, init, shape, jnp.float32)  # boxed only during init
    return value


def precision(dtype: Any) -> jax.lax.Precision | None:
    """The matmul precision that keeps float32 on TPUs (default: bfloat16 passes) and GPUs (default: TF32)."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def xavier(num_in: int, num_out: int) -> Initializer:
    """Glorot uniform with the fans of a (num_in, num_out) matrix, for a kernel of any shape."""
    limit = np.sqrt(6.0 / (num_in + num_out))

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Dense(nn.Module):
    """A linear map of the last axes of x, (..., *in_shape) -> (..., *out_shape), with bias.

    `axes` names the logical axes of the kernel, whose shape is `in_shape + out_shape`: heads have an axis of their own,
    along which tensor parallelism shards.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = jnp.float32
    kernel_init: Initializer | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._apply(x, *self._weights())

    def split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Computes `__call__` as one product per entry of `out_shape[0]`, each (..., *out_shape[1:]).

        Use this when the parts are consumed separately: slicing one large product makes TPUs copy it into another
        layout, at several times the memory traffic of the product itself.
        """
        kernel, bias = self._weights()
        axis = len(self.in_shape)
        return tuple(
            self._apply(x, jax.lax.index_in_dim(kernel, i, axis, keepdims=False), bias[i])
            for i in range(self.out_shape[0])
        )

    @nn.compact
    def _weights(self) -> tuple[jax.Array, jax.Array]:
        init = self.kernel_init or xavier(int(np.prod(self.in_shape)), int(np.prod(self.out_shape)))
        init_kernel = nn.with_logical_partitioning(init, self.axes)
        init_bias = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[len(self.in_shape) :])
        kernel = parameter(self, "kernel", init_kernel, (*self.in_shape, *self.out_shape))
        bias = parameter(self, "bias", init_bias, self.out_shape)
        return jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype)

    def _apply(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        contract = tuple(range(x.ndim - len(self.in_shape), x.ndim)), tuple(range(len(self.in_shape)))
        y = jax.lax.dot_general(x.astype(self.dtype), kernel, (contract, ((), ())), precision=precision(self.dtype))
        return y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, eps 1e-6, statistics in float32; no parameters if not `affine`."""

    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        centred = wide - mean
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)
        if self.affine:
            shape = x.shape[-1:]
            scale: Any = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), shape)
            bias: Any = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), shape)
            leading = range(y.ndim - 1)
            y = y * jnp.expand_dims(scale, leading) + jnp.expand_dims(bias, leading)
        return y.astype(self.dtype)


class Dropout(nn.Module):
    """`dropout` as a module; needs the rng "dropout" unless deterministic."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0.0:
            return x
        return dropout(self.make_rng("dropout"), x, self.rate)


def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Zeroes a fraction `rate` of the entries of x and scales the rest by 1 / (1 - rate).

    The mask is a hash of (key, global index): far cheaper than Threefry, and independent of the sharding.
    """
    word = jax.random.bits(key, (2,), jnp.uint32)
    row = _mix(jax.lax.broadcasted_iota(jnp.uint32, (x.shape[0],) + (1,) * (x.ndim - 1), 0) ^ word[0])
    inner = jnp.zeros((1, *x.shape[1:]), jnp.uint32)
    stride = 1
    for axis in reversed(range(1, x.ndim)):
        inner += jax.lax.broadcasted_iota(jnp.uint32, inner.shape, axis) * np.uint32(stride)
        stride = stride * x.shape[axis] % 2**32
    keep = _mix((inner * np.uint32(0x9E3779B9)) ^ row ^ word[1]) >= np.uint32(round(rate * 2**32))
    return jnp.where(keep, x * (1.0 / (1.0 - rate)), jnp.zeros((), x.dtype)).astype(x.dtype)


def _mix(x: jax.Array) -> jax.Array:
    """A bijective hash of uint32 (Wellons' `lowbias32`)."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum(spec, x, y)` with float32 output from two arrays of one dtype; gradients are products in that dtype.

    Every letter of `spec` must occur in two of its three terms, "x,y->out". The default gradient multiplies a float32
    cotangent with a bfloat16 operand, which takes a TPU several passes.
    """
    return jnp.einsum(spec, x, y, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def _wide_forward(spec: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return wide_product(spec, x, y), (x, y)


def _wide_backward(spec: str, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = residuals
    operands, out = spec.split("->")
    for_x, for_y = operands.split(",")
    grad = grad.astype(x.dtype)
    product = functools.partial(jnp.einsum, precision=precision(x.dtype))
    return product(f"{out},{for_y}->{for_x}", grad, y), product(f"{out},{for_x}->{for_y}", grad, x)


wide_product.defvjp(_wide_forward, _wide_backward)


@jax.custom_vjp
def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a small table (rows, W) by int index (...): (..., W), with a one-hot matmul as the gradient.

    The default gradient is a scatter-add; many indices share a row here, so it collides and is slow on TPU and CPU.
    """
    return table[index]


def _lookup_forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table[index], (index, table[:, :0])  # the empty slice carries the number of rows and the dtype


def _lookup_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None]:
    index, empty = residuals
    one_hot = jax.nn.one_hot(index.reshape(-1), empty.shape[0], dtype=grad.dtype)
    total = jax.lax.dot_general(
        one_hot,
        grad.reshape(-1, grad.shape[-1]),
        (((0,), (0,)), ((), ())),
        precision=precision(grad.dtype),
        preferred_element_type=jnp.float32,
    )
    return total.astype(empty.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
