"""The contract of a logger."""

from collections.abc import Mapping

import numpy as np


class Logger:
    """Receives the metrics of a run. Subclasses override what they need; the methods here do nothing.

    All calls come in order from one thread outside the run's, so that a slow service does not delay steps. An exception
    is reported once and ends the logger, not the run. Only the first process has loggers. After a resume, scalars that
    were already written for a step are not sent again.
    """

    def hparams(self, values: Mapping[str, bool | int | float | str]) -> None:
        """The resolved config by dotted names, at every start; fields that are None are omitted."""

    def text(self, name: str, text: str) -> None:
        """A text in Markdown, such as "config"."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name, such as "train/loss"; a step may come several times with other names."""

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3)."""

    def close(self) -> None:
        """Ends the log; called once per start of the run."""
