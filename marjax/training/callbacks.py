"""User callbacks during a run."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from marjax import distributed
from marjax.errors import UserError
from marjax.trees import PyTree

OnMetrics = Callable[[int, Mapping[str, float]], Any]
OnStep = Callable[[int, Any], Any]


class Callbacks:
    """Calls `on_metrics` and `on_step` of `marjax.train`.

    A callback ends the run by returning True or raising; an exception is reraised, with a note of the step, after the
    run is saved. A callback that raised is not called again, the other one is.
    """

    def __init__(self, on_metrics: OnMetrics | None = None, on_step: OnStep | None = None) -> None:
        """Raises UserError if a callback is not callable."""
        for name, given in (("on_metrics", on_metrics), ("on_step", on_step)):
            if given is not None and not callable(given):
                raise UserError(f"{name} is {type(given).__name__}, expected a function or None")
        self._on_metrics, self._on_step = on_metrics, on_step
        self._ends = False
        self._failure: Exception | None = None
        self._failed: set[str] = set()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Passes the finite metrics of a step to `on_metrics`."""
        if self._on_metrics is not None:
            self._call("on_metrics", self._on_metrics, step, values)

    def step(self, step: int, state: PyTree) -> None:
        """Passes the state after a step to `on_step`; the next step donates it."""
        if self._on_step is not None:
            self._call("on_step", self._on_step, step, state)

    def ended(self, is_log_step: bool) -> bool:
        """Whether to end the run; several processes agree on it, with a barrier, at log steps only."""
        if self._on_metrics is None and self._on_step is None:
            return False
        if jax.process_count() == 1:
            return self._ends
        return is_log_step and distributed.any_process(self._ends)

    def finish(self) -> None:
        """Reraises the first exception of a callback."""
        if self._failure is not None:
            raise self._failure

    def _call(self, name: str, function: Callable[..., Any], step: int, value: PyTree) -> None:
        if name in self._failed:
            return
        try:
            returned = function(step, value)
        except Exception as error:
            error.add_note(f"raised by {name} at step {step}; the run is saved and can be resumed")
            self._failed.add(name)
            self._failure, self._ends = self._failure or error, True
        else:
            self._ends = self._ends or (isinstance(returned, bool | np.bool_) and bool(returned))
