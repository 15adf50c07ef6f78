"""The loop of a training run and what it does every so many steps, whatever is trained."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from marjax import sharding
from marjax.checkpoints.manager import Checkpoints
from marjax.data.pipeline import Batch
from marjax.errors import TrainingError
from marjax.metrics import MetricWriter

Metrics = dict[str, jax.Array]
S = TypeVar("S", bound="State")


class State(Protocol):
    """What a step takes and gives: any pytree that counts the finished steps."""

    @property
    def step(self) -> jax.Array:
        """int32 ()."""


@dataclasses.dataclass(frozen=True)
class Intervals:
    """When something is done, in steps.

    Attributes:
      total: the last step.
      log: between lines of metrics.
      save: between checkpoints; the last step is always saved.
      draw: between pictures, and after the last step; 0 for none.
      evaluate: between evaluations, and after the last step; 0 for none.
    """

    total: int
    log: int
    save: int
    draw: int
    evaluate: int = 0

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and after the last, is done after this one."""
        return bool(every) and (step % every == 0 or step == self.total)


class Run(Generic[S]):
    """Takes a state from its step to the last.

    Metrics of a step are read once the next is dispatched, so that the devices never wait for the host. "finite" among
    them, 1 or 0, says whether the run may go on.
    """

    def __init__(self, every: Intervals, batch_size: int, mesh: Mesh, writer: MetricWriter, checkpoints: Checkpoints, *,
                 items: Callable[[S], dict[str, Any]], draw: Callable[[S], tuple[str, np.ndarray]], advice: str,
                 flops_share: float = 0.0, evaluate: Callable[[S], dict[str, float]] | None = None) -> None:
        """Args:
          every: when what is done.
          batch_size: images a step, of all processes.
          mesh: that batches are put on.
          writer: of metrics and pictures.
          checkpoints: where the state is saved.
          items: the trees of a checkpoint.
          draw: the name and the picture, uint8 (H, W, 3), of a state.
          advice: what to do about a loss that is not finite.
          flops_share: FLOPs of an image over a device's FLOP/s, for `perf/mfu`; 0 to leave that out.
          evaluate: metrics of a state, by name; needed if `every.evaluate`.
        """
        self.every, self.batch_size, self.mesh = every, batch_size, mesh
        self.writer, self.checkpoints = writer, checkpoints
        self.items, self.draw, self.advice, self.flops_share = items, draw, advice, flops_share
        self.evaluate = evaluate
        self.unread: list[tuple[int, Metrics]] = []  # metrics still on the devices
        self.window_start: float | None = None  # None until the first step, which compiles, is through
        self.window_steps, self.window_wait = 0, 0.0

    def steps(self, state: S, step_fn: Callable[[S, Any], tuple[S, Metrics]], batches: Iterator[Batch]) -> S:
        """Runs `step_fn` on one batch after the other; `state` may be donated. Raises TrainingError."""
        every = self.every
        start = int(state.step)
        if start and every.is_due(start, every.evaluate) and not self.writer.has(start, "eval/"):
            self._evaluate(start, state)  # the run was ended between saving this step and evaluating it
        for step in range(start + 1, every.total + 1):
            before = time.perf_counter()
            batch = sharding.put_batch(next(batches), self.mesh)
            if self._is_idle():  # else the devices were busy all the while
                self.window_wait += time.perf_counter() - before
            state, metrics = step_fn(state, batch)
            if self.unread and self.unread[-1][0] % every.log == 0:
                self._read()
            self.unread.append((step, metrics))
            self.window_steps += 1
            self.writer.progress(step)
            if self.window_start is None:
                jax.block_until_ready(metrics)
                self._restart_clock()
            saves, draws, evaluates = (every.is_due(step, each) for each in (every.save, every.draw, every.evaluate))
            if saves or draws or evaluates:
                self._read()  # also makes sure that what is saved is finite
            if saves:
                self.checkpoints.save(step, **self.items(state), meta={"images": step * self.batch_size})
            if draws:
                self.writer.image(step, *self.draw(state))
            if evaluates:
                self._evaluate(step, state)
            if saves or draws or evaluates:
                self._restart_clock()
        return state

    def _evaluate(self, step: int, state: S) -> None:
        assert self.evaluate is not None
        self.writer.scalars(step, self.evaluate(state))

    def _is_idle(self) -> bool:
        """Whether the devices are through with all steps dispatched."""
        last: Any = self.unread[-1][1]["finite"] if self.unread else None
        return last is None or last.is_ready()

    def _restart_clock(self) -> None:
        self.window_start, self.window_steps, self.window_wait = time.perf_counter(), 0, 0.0

    def _read(self) -> None:
        """Fetches the metrics kept back, stops if any step was not finite, and writes the lines that are due."""
        if not self.unread:
            return
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self.unread]
        self.unread = []
        bad = [step for step, metrics in fetched if not metrics.pop("finite")]
        if bad:
            steps = self.checkpoints.steps()
            raise TrainingError(
                f"loss, gradient or parameters were not finite in step{'s' if len(bad) > 1 else ''} "
                f"{', '.join(map(str, bad[:10]))}{' and later' if len(bad) > 10 else ''}; "
                + (f"the newest checkpoint is of step {steps[-1]}. " if steps else "there is no checkpoint yet. ")
                + self.advice)
        for step, metrics in fetched:
            if step % self.every.log == 0:
                self.writer.scalars(step, {**metrics, **self._performance()})

    def _performance(self) -> dict[str, float]:
        if self.window_start is None or not self.window_steps:
            return {}
        elapsed = time.perf_counter() - self.window_start
        rate = self.window_steps * self.batch_size / elapsed / self.mesh.size
        mfu = {"perf/mfu": rate * self.flops_share} if self.flops_share else {}
        wait = self.window_wait / elapsed
        self._restart_clock()
        return {"perf/images_per_sec_per_chip": rate, **mfu, "data/wait_frac": wait}
