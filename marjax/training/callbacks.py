"""What a user's code does during a run: functions of metrics and of steps."""

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

    One that returns True asks for the end of the run. One that raises does too: the run saves, and then the exception
    is raised, with a note of its step. One that has raised is not called again; the other still gets what is left.
    """

    def __init__(self, on_metrics: OnMetrics | None = None, on_step: OnStep | None = None) -> None:
        """Raises UserError: a callback that cannot be called."""
        for name, given in (("on_metrics", on_metrics), ("on_step", on_step)):
            if given is not None and not callable(given):
                raise UserError(f"{name} is a {type(given).__name__}: give a function, or None")
        self._on_metrics, self._on_step = on_metrics, on_step
        self._ends = False
        self._failure: Exception | None = None
        self._failed: set[str] = set()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Passes the finite metrics of a step to `on_metrics`."""
        if self._on_metrics is not None:
            self._call("on_metrics", self._on_metrics, step, values)

    def step(self, step: int, state: PyTree) -> None:
        """The state after a step, as it is dispatched; the next step donates it."""
        if self._on_step is not None:
            self._call("on_step", self._on_step, step, state)

    def ended(self, is_log_step: bool) -> bool:
        """Whether the run is to end. Several processes agree on it at steps of metrics only, which costs a barrier."""
        if self._on_metrics is None and self._on_step is None:
            return False
        if jax.process_count() == 1:
            return self._ends
        return is_log_step and distributed.any_process(self._ends)

    def finish(self) -> None:
        """Raises what a callback has raised."""
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
