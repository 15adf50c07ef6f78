"""Precision and recall of a generator (Kynkaanniemi et al. 2019), as in the ADM evaluator.

The manifold of a set is the union of balls around its points; the radius is the distance to the k-th nearest neighbour
in the set. Precision is the share of generated points in the manifold of the real ones, recall the reverse.
Legend: N rows of one set, M of the other; F features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from marjax.evaluation.across_processes import ALONE, Processes
from marjax.evaluation.metrics.pairwise import Blocks, Rows

# Distances are computed in tiles that depend on row numbers only, so that float32 products are bit-exact for any blocks
# and any number of processes.
_TALL, _WIDE = 4096, 2048
# Below this share of |x|^2 + |y|^2, the |x|^2 + |y|^2 - 2xy of float32 has lost too many digits.
_CLOSE = 1e-4
_PAIRS = 4096  # differences computed at a time


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: Blocks, generated: Blocks, *, k: int = 3, processes: Processes = ALONE) -> PrecisionRecall:
    """Compares two sets of features; every process calls this with the same blocks.

    Holds two tiles of rows and one of distances, about 100 MiB at 2048 features, and reads all blocks once for every
    4096 rows of a process's share.

    Args:
      real: blocks of float32 (n, F) with any n.
      generated: blocks of the same F.
      k: rank of the neighbour that sets the radius; a row is not its own neighbour.
      processes: those that share the work.

    Raises:
      ValueError: sets of different F, k below 1, or a set of at most k rows.
    """
    sets = Rows(real), Rows(generated)
    if sets[0].num_features != sets[1].num_features:
        raise ValueError(f"features have different widths: {sets[0].num_features} and {sets[1].num_features}")
    if not 1 <= k < min(map(len, sets)):
        raise ValueError(
            f"sets of {len(sets[0])} and {len(sets[1])} rows have no {k}-th neighbours: give 1 <= k < rows"
        )
    # Rows are centred roughly, because squares of values far from 0 would lose the digits of distances.
    origin_F = sets[0].take(np.arange(min(_WIDE, len(sets[0])))).mean(axis=0, dtype=np.float64).astype(np.float32)
    real_radii_N, made_radii_M = (_radii(rows, origin_F, k, processes) for rows in sets)
    recalled_N, precise_M = (np.zeros(len(rows), np.int64) for rows in sets)
    for made in _tiles(sets[1], origin_F, _TALL, processes):
        for reals in _tiles(sets[0], origin_F, _WIDE):
            squares_mxn = _squared_distances(made, reals)
            precise_M[made.where] |= (squares_mxn <= real_radii_N[reals.where]).any(axis=1)
            recalled_N[reals.where] |= (squares_mxn <= made_radii_M[made.where, None]).any(axis=0)
    return PrecisionRecall(*(float((processes.sum(found) > 0).mean()) for found in (precise_M, recalled_N)))


class _Tile(NamedTuple):
    """Centred rows, float32 (n, F), their squared norms, float32 (n,), and their row numbers."""

    where: slice
    rows: np.ndarray
    norms: np.ndarray


def _tiles(rows: Rows, origin_F: np.ndarray, size: int, processes: Processes = ALONE) -> Iterator[_Tile]:
    """Yields a process's share of the rows, at most `size` at a time."""
    for tile in processes.share(-(-len(rows) // size)):
        where = slice(tile * size, min(len(rows), (tile + 1) * size))
        seen_nxF = (rows.take(np.arange(where.start, where.stop)) - origin_F).astype(np.float32, copy=False)
        yield _Tile(where, seen_nxF, np.square(seen_nxF, dtype=np.float64).sum(axis=1).astype(np.float32))


def _radii(rows: Rows, origin_F: np.ndarray, k: int, processes: Processes) -> np.ndarray:
    """The squared distance of every row to its k-th nearest neighbour, float32 (N,)."""
    radii_N = np.zeros(len(rows))
    for tall in _tiles(rows, origin_F, _TALL, processes):
        nearest_nxk = np.full((len(tall.rows), k), np.inf, np.float32)
        for wide in _tiles(rows, origin_F, _WIDE):
            squares_nxm = _squared_distances(tall, wide)
            np.fill_diagonal(
                squares_nxm[
                    max(0, wide.where.start - tall.where.start) :, max(0, tall.where.start - wide.where.start) :
                ],
                np.inf,
            )
            squares_nxm.partition(min(k, len(wide.rows)) - 1, axis=1)
            nearest_nxk = np.sort(np.concatenate([nearest_nxk, squares_nxm[:, :k]], axis=1), axis=1)[:, :k]
        radii_N[tall.where] = nearest_nxk[:, -1]
    return processes.sum(radii_N).astype(np.float32)


def _squared_distances(x: _Tile, y: _Tile) -> np.ndarray:
    """Squared distances, float32 (n, m): 0 between equal rows, accurate to one per cent otherwise."""
    sums_nxm = np.add.outer(x.norms, y.norms)
    squares_nxm = x.rows @ y.rows.T
    squares_nxm *= -2
    squares_nxm += sums_nxm
    sums_nxm *= _CLOSE
    i, j = np.nonzero(squares_nxm <= sums_nxm)
    for start in range(0, len(i), _PAIRS):
        some = slice(start, start + _PAIRS)
        squares_nxm[i[some], j[some]] = np.square(x.rows[i[some]] - y.rows[j[some]], dtype=np.float64).sum(axis=1)
    return squares_nxm
