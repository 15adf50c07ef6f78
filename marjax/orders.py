"""In which order tokens are generated, how many are unknown in training, and how many each step predicts.

Shapes: B batch, L tokens of an image. `order[b, i]` is the raster position that is generated i-th; the first
`num_known[b]` entries are known. `rank` is the inverse: `rank[b, p]` is when position p is generated.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


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


def generation_plan(num_tokens: int, num_iter: int) -> tuple[int, ...]:
    """How many tokens are known before each step, and L at the end: n + 1 increasing ints from 0 to L.

    After step s of n, floor(L cos(pi/2 (s+1)/n)) stay unknown, at least 1 and at most the previous count - 1; the
    last step takes all that are left (MaskGIT's cosine schedule as the reference runs it).

    Raises:
      ValueError: `num_iter` is not between 1 and `num_tokens`.
    """
    if not 1 <= num_iter <= num_tokens:
        raise ValueError(f"num_iter is {num_iter}, but an image has {num_tokens} tokens: give 1 to {num_tokens}")
    known, unknown = [0], num_tokens
    for step in range(num_iter - 1):
        unknown = max(1, min(unknown - 1, math.floor(num_tokens * np.cos(math.pi / 2.0 * (step + 1) / num_iter))))
        known.append(num_tokens - unknown)
    return (*known, num_tokens)


def guidance_scales(plan: Sequence[int], cfg: float, schedule: str) -> np.ndarray:
    """The guidance weight of every generation step: float64 (n,).

    "linear" is 1 + (cfg - 1) * (known share after the step), where the reference counts one token as still unknown
    after the last step; "constant" is cfg.
    """
    num_tokens = plan[-1]
    if schedule == "constant":
        return np.full(len(plan) - 1, cfg, np.float64)
    if schedule != "linear":
        raise ValueError(f"cfg_schedule is {schedule!r}: give 'linear' or 'constant'")
    known_after = np.minimum(np.asarray(plan[1:], np.float64), num_tokens - 1)
    return 1.0 + (cfg - 1.0) * known_after / num_tokens


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive generation steps run at one padded shape.

    `start` and `num_predicted` have an entry a step: the known count before it and the tokens it predicts. All steps
    of the stage give the encoder `known_slots` slots and the head `new_slots`.
    """

    first_step: int
    start: tuple[int, ...]
    num_predicted: tuple[int, ...]
    new_slots: int

    @property
    def known_slots(self) -> int:
        return max(self.start)


def group_stages(
    plan: Sequence[int], max_stages: int, cost: Callable[[int, int], float], *, all_unknown: bool = False
) -> tuple[Stage, ...]:
    """Cuts the plan into at most `max_stages` runs of steps so that the padded cost is least.

    `cost(known_slots, new_slots)` is what one step costs at that padded shape, and must not decrease in either.
    `all_unknown`: a step needs a slot for every unknown token, not only for those that it predicts.
    Exact, by dynamic programming over the cuts.
    """
    if max_stages < 1:
        raise ValueError(f"max_stages is {max_stages}: give at least 1")
    known = np.asarray(plan)
    new = np.diff(known)
    needed = known[-1] - known[:-1] if all_unknown else new
    n = len(new)
    memo: dict[tuple[int, int], float] = {}

    def step_cost(slots: int, tokens: int) -> float:
        if (slots, tokens) not in memo:
            memo[slots, tokens] = cost(slots, tokens)
        return memo[slots, tokens]

    run_cost = np.full((n, n + 1), np.inf)
    for i in range(n):
        widest = 0
        for j in range(i + 1, n + 1):
            widest = max(widest, int(needed[j - 1]))
            run_cost[i, j] = (j - i) * step_cost(int(known[j - 1]), widest)
    best, cuts = run_cost[0], [np.zeros(n + 1, int)]
    for _ in range(min(max_stages, n) - 1):
        through = best[1:n, None] + run_cost[1:, :]  # a last run that starts at 1..n-1
        cut = np.argmin(through, axis=0) + 1 if n > 1 else np.zeros(n + 1, int)
        better = through.min(axis=0) < best
        best = np.where(better, through.min(axis=0), best)
        cuts.append(np.where(better, cut, -1))  # -1: one run fewer is no worse
    bounds, end = [n], n
    for table in reversed(cuts):
        if table[end] == -1:
            continue
        end = int(table[end])
        bounds.append(end)
        if end == 0:
            break
    bounds = bounds[::-1]
    return tuple(
        Stage(a, tuple(known[a:b].tolist()), tuple(new[a:b].tolist()), int(needed[a:b].max()))
        for a, b in itertools.pairwise(bounds)
    )


@jax.custom_vjp
def take(x_BxNxW: jax.Array, index_BxM: jax.Array, inverse_BxN: jax.Array) -> jax.Array:
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


def _take_forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gather(x, index), inverse


def _take_backward(inverse: jax.Array, grad: jax.Array) -> tuple[jax.Array, None, None]:
    return _gather(grad, inverse), None, None


take.defvjp(_take_forward, _take_backward)
