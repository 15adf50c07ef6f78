"""The Frechet distance between two sets of features, each taken to be Gaussian (Heusel et al. 2017, equation 6).

FID is this distance with the features of InceptionV3. Legend: N rows, F features. Everything is float64 numpy.
"""

import dataclasses

import numpy as np

from marjax.evaluation.across_processes import Processes

_ROWS = 4096  # that are held as float64 at a time


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """What the distance needs to know of a set: mean float64 (F,), covariance float64 (F, F), number of rows.

    A `count` of 0 stands for a number that is not known: a file of others does not say it.
    """

    mean: np.ndarray
    cov: np.ndarray
    count: int


class Moments:
    """The mean and covariance of rows that come in batches: memory for one (F, F) matrix, however many rows.

    Batch by batch the mean moves and the scatter around it is corrected for that (Chan, Golub and LeVeque 1983), so
    that, unlike with sums of squares, nothing is lost where a mean is large beside its standard deviation.

    Attributes:
      count: rows so far.
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self._mean_F = np.zeros(num_features)
        self._scatter_FxF = np.zeros((num_features, num_features))

    def add(self, features: np.ndarray) -> None:
        """Takes in rows (N, F) of any real type and number. Raises ValueError: another shape, or not finite."""
        if np.shape(features)[1:] != self._mean_F.shape:
            raise ValueError(f"features have the shape {np.shape(features)}: give (N, {len(self._mean_F)})")
        for start in range(0, len(features), _ROWS):
            rows_NxF = np.asarray(features[start : start + _ROWS], np.float64)
            if not np.isfinite(rows_NxF).all():
                raise ValueError("features hold values that are not finite")
            mean_F = rows_NxF.mean(axis=0)
            step_F = self._move(len(rows_NxF), mean_F)
            # The correction goes along as a row, so that one symmetric product makes the sum of both.
            centred_NxF = np.concatenate([rows_NxF - mean_F, step_F[None]])
            self._scatter_FxF += centred_NxF.T @ centred_NxF

    def merge(self, other: "Moments") -> None:
        """Takes in the rows that another, of as many features, has taken in."""
        if other.count:
            step_F = self._move(other.count, other._mean_F)
            self._scatter_FxF += other._scatter_FxF + np.outer(step_F, step_F)

    def merged(self, processes: Processes) -> "Moments":
        """Those of the rows of all processes, the same on each; every host calls it."""
        counts = processes.allgather(np.array(self.count))
        means_HxF = processes.allgather(self._mean_F)
        made = Moments(len(self._mean_F))
        for count, mean_F in zip(counts.tolist(), means_HxF, strict=True):
            if count:
                made._move(count, mean_F)
        step_F = self._mean_F - made._mean_F
        made._scatter_FxF = processes.sum(self._scatter_FxF + self.count * np.outer(step_F, step_F))
        return made

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance (divided by N - 1). Raises ValueError: fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"{self.count} rows have no covariance: give at least 2")
        return Gaussian(self._mean_F.copy(), self._scatter_FxF / (self.count - 1), self.count)

    def _move(self, count: int, mean_F: np.ndarray) -> np.ndarray:
        """Counts in `count` rows with that mean; the vector (F,) whose outer square the scatter then lacks."""
        step_F, total = mean_F - self._mean_F, self.count + count
        scale = np.sqrt(self.count * count / total)
        self._mean_F += step_F * (count / total)
        self.count = total
        return step_F * scale


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance (divided by N - 1) of features (N, F) of any real type.

    Raises:
      ValueError: not two axes, fewer than 2 rows, or a value that is not finite.
    """
    if np.ndim(features) != 2 or len(features) < 2:
        raise ValueError(f"features have the shape {np.shape(features)}: give (N, F) with N of at least 2")
    moments = Moments(np.shape(features)[1])
    moments.add(features)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0.

    With any R of C_a = R R^T, C_a C_b has the eigenvalues of the symmetric S = R^T C_b R, so the trace of its root is
    the sum of the roots of those: no root of an asymmetric matrix, which fails or turns complex where a covariance is
    singular.

    Raises:
      ValueError: the two have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features have different widths: {a.mean.shape} and {b.mean.shape}")
    root_FxF = _root(a.cov)
    product_FxF = root_FxF.T @ b.cov @ root_FxF
    eigenvalues_F = np.linalg.eigvalsh((product_FxF + product_FxF.T) / 2)
    # Rounding makes zeros slightly negative.
    trace_of_root = np.sqrt(np.maximum(eigenvalues_F, 0.0)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2.0 * trace_of_root
    return max(0.0, float(distance))


def _root(cov_FxF: np.ndarray) -> np.ndarray:
    """A matrix R with R R^T the covariance: Cholesky's, or where it is singular one that takes far longer."""
    try:
        return np.linalg.cholesky(cov_FxF)
    except np.linalg.LinAlgError:
        values_F, vectors_FxF = np.linalg.eigh(cov_FxF)
        return vectors_FxF * np.sqrt(np.maximum(values_F, 0.0))
