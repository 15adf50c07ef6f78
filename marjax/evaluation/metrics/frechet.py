"""The Frechet distance between Gaussian fits of two sets of features (Heusel et al. 2017, equation 6).

FID is this distance with the features of InceptionV3. Legend: N rows, F features. Everything is float64 numpy.
"""

import dataclasses

import numpy as np

from marjax.evaluation.across_processes import Processes

_ROWS = 4096  # converted to float64 at a time


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean, float64 (F,), covariance, float64 (F, F), and number of rows, 0 if unknown."""

    mean: np.ndarray
    cov: np.ndarray
    count: int


class Moments:
    """Accumulates mean and covariance over batches of rows, in memory for one (F, F) matrix.

    Every batch moves the mean and corrects the scatter around it (Chan, Golub and LeVeque 1983). Unlike sums of
    squares, this stays accurate if a mean is large compared to its standard deviation.

    Attributes:
      count: rows so far.
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self._mean_F = np.zeros(num_features)
        self._scatter_FxF = np.zeros((num_features, num_features))

    def add(self, features: np.ndarray) -> None:
        """Adds rows (N, F) of any real type. Raises ValueError: another shape, or a value that is not finite."""
        if np.shape(features)[1:] != self._mean_F.shape:
            raise ValueError(f"features have the shape {np.shape(features)}: give (N, {len(self._mean_F)})")
        for start in range(0, len(features), _ROWS):
            rows_NxF = np.asarray(features[start : start + _ROWS], np.float64)
            if not np.isfinite(rows_NxF).all():
                raise ValueError("features hold values that are not finite")
            mean_F = rows_NxF.mean(axis=0)
            step_F = self._move(len(rows_NxF), mean_F)
            # With the correction as one more row, a single symmetric product computes the sum.
            centred_NxF = np.concatenate([rows_NxF - mean_F, step_F[None]])
            self._scatter_FxF += centred_NxF.T @ centred_NxF

    def merged(self, processes: Processes) -> "Moments":
        """The moments over all processes, equal on each; every process calls this."""
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
        """Adds `count` rows with this mean; returns the vector (F,) whose outer square the scatter still lacks."""
        step_F, total = mean_F - self._mean_F, self.count + count
        scale = np.sqrt(self.count * count / total)
        self._mean_F += step_F * (count / total)
        self.count = total
        return step_F * scale


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance (divided by N - 1) of features (N, F) of any real type.

    Raises:
      ValueError: another shape, fewer than 2 rows, or a value that is not finite.
    """
    if np.ndim(features) != 2 or len(features) < 2:
        raise ValueError(f"features have the shape {np.shape(features)}: give (N, F) with N of at least 2")
    moments = Moments(np.shape(features)[1])
    moments.add(features)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0.

    With C_a = R R^T, C_a C_b has the eigenvalues of the symmetric S = R^T C_b R, so the trace of its root is the sum of
    their roots. The root of the asymmetric C_a C_b would fail or turn complex for singular covariances.

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
    """A matrix R with R R^T the covariance: by Cholesky, or by the slower eigendecomposition if it is singular."""
    try:
        return np.linalg.cholesky(cov_FxF)
    except np.linalg.LinAlgError:
        values_F, vectors_FxF = np.linalg.eigh(cov_FxF)
        return vectors_FxF * np.sqrt(np.maximum(values_F, 0.0))
