"""The generation plan: tokens predicted per autoregressive step, cfg scales, and stages of one padded shape."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np


def generation_plan(num_tokens: int, num_iter: int) -> tuple[int, ...]:
    """The number of known tokens before each of n steps and at the end: n + 1 increasing ints from 0 to L.

    After step s, floor(L cos(pi/2 (s+1)/n)) tokens stay unknown, at least 1 and at most the previous count - 1; the
    last step predicts all remaining tokens (MaskGIT's cosine schedule, as in the reference).

    Raises:
      ValueError: `num_iter` is not between 1 and `num_tokens`.
    """
    if not 1 <= num_iter <= num_tokens:
        raise ValueError(f"num_iter={num_iter} is out of range; use 1 to {num_tokens}, the number of tokens")
    known, unknown = [0], num_tokens
    for step in range(num_iter - 1):
        unknown = max(1, min(unknown - 1, math.floor(num_tokens * np.cos(math.pi / 2.0 * (step + 1) / num_iter))))
        known.append(num_tokens - unknown)
    return (*known, num_tokens)


def cfg_scales(plan: Sequence[int], cfg: float, schedule: str) -> np.ndarray:
    """The cfg scale of each generation step: float64 (n,).

    "linear" is 1 + (cfg - 1) * (known fraction after the step); as in the reference, one token counts as unknown after
    the last step. "constant" is cfg.
    """
    num_tokens = plan[-1]
    if schedule == "constant":
        return np.full(len(plan) - 1, cfg, np.float64)
    if schedule != "linear":
        raise ValueError(f"cfg_schedule={schedule!r} is invalid; use 'linear' or 'constant'")
    known_after = np.minimum(np.asarray(plan[1:], np.float64), num_tokens - 1)
    return 1.0 + (cfg - 1.0) * known_after / num_tokens


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive generation steps that share one padded shape.

    `start` and `num_predicted` have one entry per step: the number of known and of predicted tokens. Every step of the
    stage uses `known_slots` slots in the encoder and `new_slots` in the head.
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
    """Splits the plan into at most `max_stages` stages of least total cost, by dynamic programming.

    `cost(known_slots, new_slots)` is the cost of one step at that padded shape and must not decrease in either.
    With `all_unknown`, a step needs a slot for every unknown token, not only for those that it predicts.
    """
    if max_stages < 1:
        raise ValueError(f"max_stages={max_stages} is out of range; use at least 1")
    known = np.asarray(plan)
    new = np.diff(known)
    needed = known[-1] - known[:-1] if all_unknown else new
    n = len(new)
    step_cost = functools.cache(cost)
    run_cost = np.full((n, n + 1), np.inf)
    for i in range(n):
        widest = 0
        for j in range(i + 1, n + 1):
            widest = max(widest, int(needed[j - 1]))
            run_cost[i, j] = (j - i) * step_cost(int(known[j - 1]), widest)
    best, cuts = run_cost[0], [np.zeros(n + 1, int)]
    for _ in range(min(max_stages, n) - 1):
        through = best[1:n, None] + run_cost[1:, :]  # the last stage starts at 1..n-1
        cut = np.argmin(through, axis=0) + 1 if n > 1 else np.zeros(n + 1, int)
        better = through.min(axis=0) < best
        best = np.where(better, through.min(axis=0), best)
        cuts.append(np.where(better, cut, -1))  # -1: one stage fewer is no worse
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
