"""The generation plan: how many tokens each autoregressive step predicts, at which guidance, in which padded stage."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np


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


def cfg_scales(plan: Sequence[int], cfg: float, schedule: str) -> np.ndarray:
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
