"""The Inception Score (Salimans et al. 2016), as in torch-fidelity, which the reference uses.

Images are shuffled with a fixed seed, because samples are sorted by class, and divided into splits. The score of a
split is exp of the mean Kullback-Leibler divergence of p(class | image) from its mean. The split of an image depends on
its index and the number of images only, so sums suffice. Legend: N images, K classes, S splits.
"""

from typing import NamedTuple

import numpy as np

from marjax.evaluation.across_processes import Processes


class Score(NamedTuple):
    """Mean and standard deviation (divided by S) of the scores of the splits."""

    mean: float
    std: float


class ScoreSums:
    """Accumulates the score over batches of images, in any order, in memory for S x K sums and N counts."""

    def __init__(self, total: int, num_classes: int, splits: int = 10, seed: int = 2020) -> None:
        """Expects `total` images (N) over all processes. Raises ValueError: fewer than one per split."""
        if not 1 <= splits <= total:
            raise ValueError(f"{total} images cannot fill {splits} splits: give at least one image per split")
        order_N = np.random.RandomState(seed).permutation(total)
        ends_S = np.arange(1, splits + 1) * total // splits
        self._split_of_N = np.empty(total, np.int64)
        self._split_of_N[order_N] = np.searchsorted(ends_S, np.arange(total), side="right")
        self._times_N = np.zeros(total, np.int64)
        self._negentropy_S = np.zeros(splits)
        self._classes_SxK = np.zeros((splits, num_classes))

    def add(self, indices: np.ndarray, logits: np.ndarray) -> None:
        """Adds images.

        Args:
          indices: int (B,), in [0, N).
          logits: unnormalised log probabilities (B, K).

        Raises:
          ValueError: other shapes, indices out of range, or a logit that is not finite.
        """
        indices_B, logits_BxK = np.asarray(indices), np.asarray(logits, np.float64)
        if indices_B.ndim != 1 or logits_BxK.shape != (len(indices_B), self._classes_SxK.shape[1]):
            raise ValueError(
                f"indices {indices_B.shape} and logits {logits_BxK.shape}: expected (B,) and "
                f"(B, {self._classes_SxK.shape[1]})"
            )
        if not len(indices_B):
            return
        if indices_B.min() < 0 or indices_B.max() >= len(self._times_N):
            raise ValueError(
                f"indices lie in [{indices_B.min()}, {indices_B.max()}]: expected [0, {len(self._times_N)})"
            )
        if not np.isfinite(logits_BxK).all():
            raise ValueError("logits hold values that are not finite")
        shifted_BxK = logits_BxK - logits_BxK.max(axis=1, keepdims=True)
        p_BxK = np.exp(shifted_BxK)
        norm_B = p_BxK.sum(axis=1)
        p_BxK /= norm_B[:, None]
        negentropy_B = (p_BxK * shifted_BxK).sum(axis=1) - np.log(norm_B)
        splits_B = self._split_of_N[indices_B]
        member_SxB = (splits_B == np.arange(len(self._negentropy_S))[:, None]).astype(np.float64)
        self._classes_SxK += member_SxB @ p_BxK
        self._negentropy_S += member_SxB @ negentropy_B
        np.add.at(self._times_N, indices_B, 1)

    def merged(self, processes: Processes) -> "ScoreSums":
        """The sums over all processes, equal on each; every process calls this."""
        made = ScoreSums(len(self._times_N), self._classes_SxK.shape[1], len(self._negentropy_S))
        made._split_of_N = self._split_of_N
        made._times_N = processes.sum(self._times_N)
        made._negentropy_S = processes.sum(self._negentropy_S)
        made._classes_SxK = processes.sum(self._classes_SxK)
        return made

    def result(self) -> Score:
        """The score. Raises ValueError: an image is missing, or came twice."""
        wrong_N = self._times_N != 1
        if wrong_N.any():
            index = int(wrong_N.argmax())
            raise ValueError(
                f"{wrong_N.sum()} of {len(wrong_N)} images are missing or came more than once (the first, "
                f"image {index}, came {self._times_N[index]} times): give each image once"
            )
        sizes_S = np.bincount(self._split_of_N, minlength=len(self._negentropy_S))
        q_SxK = self._classes_SxK / sizes_S[:, None]
        log_q_SxK = np.log(q_SxK, out=np.zeros_like(q_SxK), where=q_SxK > 0)  # 0 log 0 is 0
        scores_S = np.exp(self._negentropy_S / sizes_S - (q_SxK * log_q_SxK).sum(axis=1))
        return Score(float(scores_S.mean()), float(scores_S.std()))
