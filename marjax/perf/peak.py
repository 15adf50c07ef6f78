"""Peak FLOP/s of a device, the denominator of MFU."""

import functools
import time

import jax
import jax.numpy as jnp

from marjax import numerics
from marjax.perf import chips


@functools.cache
def device_peak(dtype: str) -> float:
    """FLOP/s of one device: its chip's bfloat16 peak (`chips.CHIPS`) if known, otherwise measured once in `dtype`.

    On CPU the devices share one processor, so its measured rate is divided among them.
    """
    device = jax.devices()[0]
    if (chip := chips.of_kind(device.device_kind)) is not None:
        return chip.device_flops
    measured = measured_peak(dtype, seconds=0.3)
    return measured / jax.local_device_count() if device.platform == "cpu" else measured


def measured_peak(dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest of repeated square matmuls on one device, over at least `seconds`.

    The matrices are 2048 wide on CPU and 8192 elsewhere.
    """
    side = 2048 if jax.default_backend() == "cpu" else 8192
    precision = jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    matmul = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
    matrix = jax.random.normal(numerics.key(0), (side, side)).astype(dtype)
    assert bool(jnp.isfinite(matmul(matrix)).all())
    best, spent = float("inf"), 0.0
    while spent < seconds:
        start = time.perf_counter()
        matmul(matrix).block_until_ready()
        elapsed = time.perf_counter() - start
        best, spent = min(best, elapsed), spent + elapsed
    return 2.0 * side**3 / best
