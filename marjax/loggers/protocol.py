"""What a logger is."""

from collections.abc import Mapping

import numpy as np


class Logger:
    """Receives what a run reports. A subclass overrides what it wants; the methods here do nothing.

    All calls come from one thread that is not the run's, in order, so that a slow service does not delay steps. An
    exception is reported once and ends the logger, not the run. Only the first process of a run has loggers. After a
    resume, scalars that were already written for a step are not sent again.
    """

    def hparams(self, values: Mapping[str, bool | int | float | str]) -> None:
        """The run's resolved config by dotted names, at every start; fields that are None are left out."""

    def text(self, name: str, text: str) -> None:
        """A text for people, such as "config", in Markdown."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name, such as "train/loss"; a step may come several times, with other names."""

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3)."""

    def close(self) -> None:
        """Ends the log; called once, at the end of the run or of this start of it."""
