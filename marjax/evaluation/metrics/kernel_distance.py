"""The kernel distance KID (Binkowski et al. 2018): squared maximum mean discrepancy under a cubic kernel.

The estimate is unbiased, so it is about 0, and often below, for two sets of one distribution, at any number of rows.
Legend: N rows of one set, M of the other; n and m rows of a subset; F features. Everything is float64.
"""

from typing import NamedTuple

import numpy as np

from marjax.evaluation.across_processes import ALONE, Processes
from marjax.evaluation.metrics.pairwise import Blocks, Rows

_SUBSETS = 8  # gathered in one pass over the blocks


class KernelDistance(NamedTuple):
    """Mean and standard deviation over the subsets."""

    mean: float
    std: float


def kernel_distance(
    first: Blocks,
    second: Blocks,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
    processes: Processes = ALONE,
) -> KernelDistance:
    """Compares two sets of features; every process calls this with the same blocks.

    Subsets are chosen by row number and drawn as torch-fidelity draws them, the first set's before the second's, so
    the sets' order and that of their rows matter as the seed does, unless a set is no larger than a subset.

    Args:
      first: blocks of float32 (n, F), with any n.
      second: blocks of the same F.
      subsets: number of pairs of subsets.
      size: rows of a subset, at most.
      seed: of the subsets.
      processes: those that share the work.

    Raises:
      ValueError: sets of different F or of fewer than 2 rows, or arguments out of range.
    """
    x, y = Rows(first), Rows(second)
    if x.num_features != y.num_features:
        raise ValueError(f"features have different widths: {x.num_features} and {y.num_features}")
    if min(size, len(x), len(y)) < 2 or subsets < 1:
        raise ValueError(
            f"{subsets} subsets of {size} out of {len(x)} and {len(y)} rows: give at least 1 subset of 2 rows"
        )
    rng = np.random.RandomState(seed)
    chosen = [
        tuple(rng.choice(len(rows), min(size, len(rows)), replace=False) for rows in (x, y)) for _ in range(subsets)
    ]
    estimates = np.zeros(subsets)
    share = processes.share(subsets)
    for start in range(0, len(share), _SUBSETS):
        some = share[start : start + _SUBSETS]
        gathered = (
            rows.take(np.concatenate([chosen[subset][side] for subset in some])).reshape(
                len(some), -1, rows.num_features
            )
            for side, rows in enumerate((x, y))
        )
        for subset, x_nxF, y_mxF in zip(some, *gathered, strict=True):
            estimates[subset] = _discrepancy(x_nxF.astype(np.float64), y_mxF.astype(np.float64))
    estimates = processes.sum(estimates)
    return KernelDistance(float(estimates.mean()), float(estimates.std()))


def _discrepancy(x_nxF: np.ndarray, y_mxF: np.ndarray) -> float:
    """The unbiased estimate of MMD^2: equation 4 of Binkowski et al."""
    within = sum(
        (kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1))
        for rows in (x_nxF, y_mxF)
        for kernel in [_kernel(rows, rows)]
    )
    return float(within - 2 * _kernel(x_nxF, y_mxF).mean())


def _kernel(x_nxF: np.ndarray, y_mxF: np.ndarray) -> np.ndarray:
    """(x.y / F + 1)^3, (n, m)."""
    base_nxm = x_nxF @ y_mxF.T
    base_nxm /= x_nxF.shape[1]
    base_nxm += 1
    return base_nxm * base_nxm * base_nxm
