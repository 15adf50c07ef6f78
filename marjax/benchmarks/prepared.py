"""A program to benchmark, ready to compile and run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from marjax.memory import Batch


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A program to benchmark.

    Attributes:
      name: for messages, such as "train step".
      lower: lowers the program from shapes, without creating parameters.
      make_run: creates the parameters, and returns a function that runs the compiled program once and waits for it.
      batch: the batch size and its config field.
      flops_per_image: model FLOPs per image, as in `perf.flops`.
      settings: config values for the result.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    make_run: Callable[[jax.stages.Compiled], Callable[[], None]]
    batch: Batch
    flops_per_image: float
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
