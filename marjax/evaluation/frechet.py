"""The Frechet distance between two sets of features, each taken to be Gaussian (Heusel et al. 2017, equation 6).

FID is this distance with the features of InceptionV3. Legend: N rows, F features. Everything is float64 numpy.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """What the distance needs to know of a set: mean float64 (F,), covariance float64 (F, F), number of rows."""

    mean: np.ndarray
    cov: np.ndarray
    count: int


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance (divided by N - 1) of features (N, F) of any real type.

    Raises:
      ValueError: not two axes, fewer than 2 rows, or a value that is not finite.
    """
    features_NxF = np.asarray(features, np.float64)
    if features_NxF.ndim != 2 or len(features_NxF) < 2:
        raise ValueError(f"features have the shape {features_NxF.shape}: give (N, F) with N of at least 2")
    if not np.isfinite(features_NxF).all():
        raise ValueError("features hold values that are not finite")
    mean_F = features_NxF.mean(axis=0)
    centred_NxF = features_NxF - mean_F
    return Gaussian(mean_F, centred_NxF.T @ centred_NxF / (len(features_NxF) - 1), len(features_NxF))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0.

    C_a C_b has the eigenvalues of the symmetric S = C_a^(1/2) C_b C_a^(1/2), so the trace of its root is the sum of the
    roots of those: no root of an asymmetric matrix, which fails or turns complex where a covariance is singular.

    Raises:
      ValueError: the two have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features have different widths: {a.mean.shape} and {b.mean.shape}")
    values_F, vectors_FxF = np.linalg.eigh(a.cov)
    root_FxF = (vectors_FxF * np.sqrt(np.maximum(values_F, 0.0))) @ vectors_FxF.T
    product_FxF = root_FxF @ b.cov @ root_FxF
    eigenvalues_F = np.linalg.eigvalsh((product_FxF + product_FxF.T) / 2)
    # Rounding makes zeros slightly negative.
    trace_of_root = np.sqrt(np.maximum(eigenvalues_F, 0.0)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2.0 * trace_of_root
    return max(0.0, float(distance))
