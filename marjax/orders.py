"""Generation orders and mask ratios.

`order[b, i]` is the raster position of the i-th generated token; the first `num_known[b]` entries are known. `rank` is
its inverse: position p is generated at step `rank[b, p]`. Shapes: B batch, L tokens, W width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


def draw_orders(key: jax.Array, batch: int, num_tokens: int) -> jax.Array:
    """Draws a uniformly random permutation per image: int32 (B, L)."""
    return jnp.argsort(jax.random.uniform(key, (batch, num_tokens)), axis=-1).astype(jnp.int32)


def raster_orders(key: jax.Array, batch: int, num_tokens: int) -> jax.Array:
    """The raster order of every image: int32 (B, L); takes a key as `draw_orders` does."""
    return jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (batch, num_tokens))


ORDERS = {"raster": raster_orders, "random": draw_orders}


def ranks(order: jax.Array) -> jax.Array:
    """The inverse permutations: int32 (B, L) from int (B, L)."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def max_visible(num_tokens: int, mask_ratio_min: float) -> int:
    """The maximal number of known tokens in training, which is the number of encoder slots."""
    return num_tokens - math.ceil(num_tokens * mask_ratio_min)


@dataclasses.dataclass(frozen=True)
class MaskRatio:
    """The distribution of the mask ratio, the fraction of unknown tokens in training (paper, section 4.3, appendix B).

    A normal distribution truncated to [`minimum`, 1]; ceil(L * ratio) tokens are unknown. With `per="image"`, every
    image has its own ratio; with `per="batch"`, all share one, as in the reference.
    """

    mean: float = 1.0
    std: float = 0.25
    minimum: float = 0.7
    per: str = "image"

    def draw_num_known(self, key: jax.Array, batch: int, num_tokens: int) -> jax.Array:
        """Draws the number of known tokens per image: int32 (B,), between 0 and `max_visible`."""
        lower, upper = (self.minimum - self.mean) / self.std, (1.0 - self.mean) / self.std
        shape = (batch,) if self.per == "image" else (1,)
        ratio = self.mean + self.std * jax.random.truncated_normal(key, lower, upper, shape)
        known = num_tokens - jnp.ceil(num_tokens * ratio).astype(jnp.int32)
        return jnp.broadcast_to(jnp.clip(known, 0, max_visible(num_tokens, self.minimum)), (batch,))

    def expected_known(self, num_tokens: int) -> float:
        """The mean of `draw_num_known`."""

        def cdf(ratio: float) -> float:
            return 0.5 * (1.0 + math.erf((ratio - self.mean) / (self.std * math.sqrt(2.0))))

        low, total = cdf(self.minimum), cdf(1.0) - cdf(self.minimum)
        # ceil(L * ratio) <= u exactly when ratio <= u / L; known > k when unknown <= L - k - 1.
        return sum(
            (cdf((num_tokens - k - 1) / num_tokens) - low) / total for k in range(max_visible(num_tokens, self.minimum))
        )


@jax.custom_vjp
def gather_rows(x_BxTxW: jax.Array, index_BxS: jax.Array, inverse_BxT: jax.Array) -> jax.Array:
    """Gathers rows of x, zero where the index is out of range: (B, S, W) from (B, T, W).

    Every row may be gathered at most once. `inverse[b, t]` is the s with `index[b, s] == t`, out of range if there is
    none: it makes the gradient a gather too, where XLA would scatter, which is slow on TPU and CPU.
    """
    return _gather(x_BxTxW, index_BxS)


def _gather(x_BxTxW: jax.Array, index_BxS: jax.Array) -> jax.Array:
    size = x_BxTxW.shape[1]
    if size == 0:
        return jnp.zeros((*index_BxS.shape, x_BxTxW.shape[2]), x_BxTxW.dtype)
    inside = (index_BxS >= 0) & (index_BxS < size)
    rows = jnp.take_along_axis(x_BxTxW, jnp.clip(index_BxS, 0, size - 1)[..., None], axis=1)
    return jnp.where(inside[..., None], rows, jnp.zeros((), x_BxTxW.dtype))


def _gather_rows_forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gather(x, index), inverse


def _gather_rows_backward(inverse: jax.Array, grad: jax.Array) -> tuple[jax.Array, None, None]:
    return _gather(grad, inverse), None, None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)
