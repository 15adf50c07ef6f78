"""In which order tokens are generated, and how many are unknown in training.

Shapes: B batch, L tokens of an image. `order[b, i]` is the raster position that is generated i-th; the first
`num_known[b]` entries are known. `rank` is the inverse: `rank[b, p]` is when position p is generated.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


def draw_orders(key: jax.Array, batch: int, num_tokens: int) -> jax.Array:
    """One uniformly random permutation an image: int32 (B, L)."""
    return jnp.argsort(jax.random.uniform(key, (batch, num_tokens)), axis=-1).astype(jnp.int32)


def raster_orders(key: jax.Array, batch: int, num_tokens: int) -> jax.Array:
    """Row by row, the same for every image: int32 (B, L). The key is not used."""
    del key
    return jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (batch, num_tokens))


ORDERS = {"raster": raster_orders, "random": draw_orders}


def ranks(order: jax.Array) -> jax.Array:
    """The inverse permutations: int32 (B, L) from int (B, L)."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def max_visible(num_tokens: int, mask_ratio_min: float) -> int:
    """The most tokens of an image that training ever shows, hence the slots the encoder needs."""
    return num_tokens - math.ceil(num_tokens * mask_ratio_min)


@dataclasses.dataclass(frozen=True)
class MaskRatio:
    """The distribution of the unknown share in training (paper, section 4.3 and appendix B).

    A normal of mean `mean` and standard deviation `std`, truncated to [`minimum`, 1]; the unknown count of an image
    is ceil(L * ratio). `per` is "image" (each image draws its own) or "batch" (one draw for all, as the reference).
    """

    mean: float = 1.0
    std: float = 0.25
    minimum: float = 0.7
    per: str = "image"

    def draw_num_known(self, key: jax.Array, batch: int, num_tokens: int) -> jax.Array:
        """How many tokens of each image are known: int32 (B,), between 0 and `max_visible`."""
        lower, upper = (self.minimum - self.mean) / self.std, (1.0 - self.mean) / self.std
        shape = (batch,) if self.per == "image" else (1,)
        ratio = self.mean + self.std * jax.random.truncated_normal(key, lower, upper, shape)
        known = num_tokens - jnp.ceil(num_tokens * ratio).astype(jnp.int32)
        return jnp.broadcast_to(jnp.clip(known, 0, max_visible(num_tokens, self.minimum)), (batch,))

    def expected_known(self, num_tokens: int) -> float:
        """The mean of `draw_num_known`, from the normal distribution function."""

        def cdf(ratio: float) -> float:
            return 0.5 * (1.0 + math.erf((ratio - self.mean) / (self.std * math.sqrt(2.0))))

        low, total = cdf(self.minimum), cdf(1.0) - cdf(self.minimum)
        # ceil(L * ratio) <= u exactly when ratio <= u / L; known > k when unknown <= L - k - 1.
        return sum(
            (cdf((num_tokens - k - 1) / num_tokens) - low) / total for k in range(max_visible(num_tokens, self.minimum))
        )


@jax.custom_vjp
def gather_rows(x_BxNxW: jax.Array, index_BxM: jax.Array, inverse_BxN: jax.Array) -> jax.Array:
    """Rows of x by index, zero where the index is out of range: (B, M, W) from (B, N, W).

    `inverse` says where each row of x went: `inverse[b, n]` is the m with `index[b, m] == n`, or anything outside
    [0, M) when no m has it. It lets the gradient be a gather too, where XLA would scatter (slow on TPU and CPU alike).
    Every row may be taken at most once.
    """
    del inverse_BxN
    return _gather(x_BxNxW, index_BxM)


def _gather(x_BxNxW: jax.Array, index_BxM: jax.Array) -> jax.Array:
    size = x_BxNxW.shape[1]
    if size == 0:
        return jnp.zeros((*index_BxM.shape, x_BxNxW.shape[2]), x_BxNxW.dtype)
    inside = (index_BxM >= 0) & (index_BxM < size)
    rows = jnp.take_along_axis(x_BxNxW, jnp.clip(index_BxM, 0, size - 1)[..., None], axis=1)
    return jnp.where(inside[..., None], rows, jnp.zeros((), x_BxNxW.dtype))


def _gather_rows_forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gather(x, index), inverse


def _gather_rows_backward(inverse: jax.Array, grad: jax.Array) -> tuple[jax.Array, None, None]:
    return _gather(grad, inverse), None, None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)
