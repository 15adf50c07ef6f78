"""The dense layer, LayerNorm, dropout and table lookup that every network here is made of.

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
embedding_init = nn.with_logical_partitioning(normal_002, (None, "embed"))  # of a table of rows
vector_init = nn.with_logical_partitioning(normal_002, ("embed",))


def parameter(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> jax.Array:
    """A float32 parameter of the module."""
    value: Any = module.param(name, init, shape, jnp.float32)  # unboxed, when the module is applied
    return value


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Float32 means float32: without this, TPUs multiply in bfloat16 and newer GPUs in TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def xavier(num_in: int, num_out: int) -> Initializer:
    """Glorot uniform for a weight that stands for a (num_in, num_out) matrix, whatever its shape."""
    limit = np.sqrt(6.0 / (num_in + num_out))

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Dense(nn.Module):
    """A linear map of the last axes of x, (..., *in_shape) -> (..., *out_shape), with bias.

    `axes` are the logical names of the kernel's axes, `in_shape + out_shape` of them. The kernel's shape keeps heads
    apart, so that tensor parallelism cuts between them.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = jnp.float32
    kernel_init: Initializer | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., *out_shape) from (..., *in_shape)."""
        kernel, bias = self._weights()
        return self._apply(x, kernel, bias)

    def split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`__call__`, cut along the first axis of `out_shape`: so many products, each (..., *out_shape[1:]).

        Whoever takes the parts by themselves asks for them so: cutting one product's result costs a TPU copies of it in
        another layout, several times the product's own traffic.
        """
        kernel, bias = self._weights()
        axis = len(self.in_shape)
        return tuple(
            self._apply(x, jax.lax.index_in_dim(kernel, i, axis, keepdims=False), bias[i])
            for i in range(self.out_shape[0])
        )

    @nn.compact
    def _weights(self) -> tuple[jax.Array, jax.Array]:
        fan_in, fan_out = int(np.prod(self.in_shape)), int(np.prod(self.out_shape))
        init = self.kernel_init or xavier(fan_in, fan_out)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, self.axes), (*self.in_shape, *self.out_shape), jnp.float32
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(nn.initializers.zeros, self.axes[len(self.in_shape) :]),
            self.out_shape,
            jnp.float32,
        )
        return jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype)

    def _apply(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        contract = tuple(range(x.ndim - len(self.in_shape), x.ndim)), tuple(range(len(self.in_shape)))
        y = jax.lax.dot_general(x.astype(self.dtype), kernel, (contract, ((), ())), precision=precision(self.dtype))
        return y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, eps 1e-6, statistics in float32; `affine=False` has no weights."""

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
    """Zeroes a share `rate` of the entries and scales the rest; needs the rng "dropout" unless deterministic."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0.0:
            return x
        return dropout(self.make_rng("dropout"), x, self.rate)


def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """x with a share `rate` of its entries zeroed and the others scaled by 1 / (1 - rate).

    The mask is a hash of (key, index), with far less arithmetic than Threefry. It is a function of the global index, so
    no sharding changes it.
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
    """A bijection of uint32 whose every output bit depends on every input bit (Wellons' `lowbias32`)."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum(spec, x, y)` in float32 from two arrays of one dtype, with gradients from products in that dtype.

    Every letter stands in two of the three terms of `spec`, "x,y->out". JAX's own gradient multiplies the float32
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
def lookup(table_NxW: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a small table, (..., W) from int (...) in [0, N), with a one-hot matmul as its gradient.

    Many indices share a row here, so XLA's own gradient is a scatter-add with collisions, slow on TPU and CPU.
    """
    return table_NxW[index]


def _lookup_forward(table_NxW: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # An empty slice carries the table's height and dtype to the backward pass.
    return table_NxW[index], (index, table_NxW[:, :0])


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
