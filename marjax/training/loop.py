"""The loop of a training run and what it does every so many steps, whatever is trained."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marjax import distributed, memory, numerics, progress, sharding
from marjax.checkpoints.manager import Checkpoints
from marjax.config.overrides import flatten
from marjax.data.pipeline import Batch, Batches
from marjax.errors import TrainingError
from marjax.loggers import LOGGERS, Logger, open_loggers
from marjax.metrics import MetricWriter
from marjax.training.callbacks import Callbacks
from marjax.training.clock import Clock
from marjax.training.profile import Profile
from marjax.trees import PyTree
from marjax.workdir import first_start

Metrics = dict[str, jax.Array]
S = TypeVar("S", bound="State")


class State(Protocol):
    """What is trained: a pytree."""

    @property
    def step(self) -> jax.Array:
        """int32 ()."""

    @property
    def params(self) -> PyTree:
        """The parameters."""


@dataclasses.dataclass(frozen=True)
class Intervals:
    """When something is done, in steps.

    Attributes:
      total: the last step.
      log: between lines of metrics.
      save: between checkpoints; the last step is always saved, and so is one that is evaluated, before that.
      draw: between pictures, and after the last step; 0 for none.
      evaluate: between evaluations, and after the last step; 0 for none.
    """

    total: int
    log: int
    save: int
    draw: int
    evaluate: int = 0

    def is_due(self, step: int, every: int) -> bool:
        """Whether what is done every `every` steps, and after the last, is due after this step."""
        return bool(every) and (step % every == 0 or step == self.total)


@dataclasses.dataclass(frozen=True)
class Task(Generic[S]):
    """What is trained.

    Attributes:
      every: when what is done.
      batch_size: images per step, over all processes.
      step: jitted, (state, batch) -> (state, metrics); the state may be donated. The metric "finite", 1 or 0, says
        whether the run may continue.
      items: the trees of a checkpoint of a state.
      draw: the name and the picture, uint8 (H, W, 3), of a state.
      advice: what to do about a loss that is not finite, for the error.
      evaluate: metrics of a state, by name; needed if `Intervals.evaluate`.
      flops_share: FLOPs per image over a device's FLOP/s, for `perf/mfu`; 0 leaves it out.
    """

    every: Intervals
    batch_size: int
    step: Callable[[S, PyTree], tuple[S, Metrics]]
    items: Callable[[S], dict[str, PyTree]]
    draw: Callable[[S], tuple[str, np.ndarray]]
    advice: str
    evaluate: Callable[[S], dict[str, float]] | None = None
    flops_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class Start(Generic[S]):
    """How a task starts.

    Attributes:
      abstract: the state as ShapeDtypeStructs with shardings.
      create: a new state.
      restore: the state from the items of a checkpoint.
      open_batches: this process's part of the batches from a step on.
      notes: lines to log.
    """

    abstract: S
    create: Callable[[], S]
    restore: Callable[[dict[str, PyTree]], S]
    open_batches: Callable[[int], Batches]
    notes: Sequence[str] = ()


def run(
    task: Task[S],
    start: Start[S],
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    mesh: Mesh,
    *,
    callbacks: Callbacks | None = None,
    loggers: Sequence[Logger] = (),
    profile: Profile | None = None,
) -> S:
    """Trains in a work directory, from its newest whole checkpoint if there is one.

    Args:
      task: what is trained.
      start: how it starts.
      config: resolved; `checkpoint` and `log` are read, and all of it is logged.
      workdir: locked by this run.
      mesh: that batches are put on.
      callbacks: of the user.
      loggers: of the user, on the first process.
      profile: which steps to trace.

    Raises:
      Exception: as `Run.steps`.
    """
    keep = config.checkpoint
    with Checkpoints(epath.Path(workdir) / "checkpoints", keep=keep.keep, keep_every=keep.keep_every) as checkpoints:
        restored = checkpoints.restore(task.items(start.abstract))
        if restored is None:
            with progress.activity("creating the parameters", show=config.log.progress):
                state = start.create()
        else:
            state = start.restore(restored.items)
        begun, meta = int(state.step), {} if restored is None else restored.meta
        active = jax.process_index() == 0
        clock = Clock(
            task.batch_size,
            mesh.size,
            task.flops_share,
            productive=meta.get("productive_seconds", 0.0),
            first_start=first_start(workdir, write=active),
        )
        with MetricWriter(
            workdir,
            start_step=begun,
            total_steps=task.every.total,
            tensorboard=config.log.tensorboard,
            progress=config.log.progress,
            active=active,
            loggers=open_loggers(log_targets(config), workdir, loggers) if active else (),
        ) as writer:
            writer.describe(flatten(config))
            count = parameter_overview.count_parameters(start.abstract.params) / 1e6
            steps = f"resuming at step {begun} of {task.every.total}" if begun else f"{task.every.total} steps"
            changed = numerics.differences(meta.get("numerics"), numerics.recorded())
            for note in (*start.notes, f"{count:.2f} M parameters; {steps}", changed):
                if note:
                    writer.note(note)
            if profile is not None and begun >= profile.first:  # resumed after a preemption
                writer.note(f"steps {profile.first}:{profile.last} are done: nothing is traced")
                profile = None
            outputs = Outputs(writer, checkpoints, callbacks or Callbacks())
            with start.open_batches(begun) as batches, jax.set_mesh(mesh):
                return Run(task, outputs, clock, mesh, profile).steps(state, batches)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the results of a run go: metrics and pictures, checkpoints, callbacks of the user."""

    writer: MetricWriter
    checkpoints: Checkpoints
    callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)


def log_targets(config: ConfigDict) -> dict[str, str]:
    """The loggers of `config.log` by name, "" for those that are off."""
    return {name: config.log[name] for name in LOGGERS}


class Run(Generic[S]):
    """Takes a state from its step to the last.

    The devices never wait for the host: the metrics of a step are read after the next one is dispatched. Nor do they
    wait for storage: a checkpoint that is due while the previous one is being written is saved a little later.
    """

    def __init__(
        self, task: Task[S], outputs: Outputs, clock: Clock, mesh: Mesh, profile: Profile | None = None
    ) -> None:
        """`mesh` is the one that batches are put on; `profile` says which steps to trace, if any."""
        self.task, self.every, self.clock, self.mesh, self.profile = task, task.every, clock, mesh, profile
        self.writer, self.checkpoints, self.callbacks = outputs.writer, outputs.checkpoints, outputs.callbacks
        self.unread: list[tuple[int, Metrics]] = []  # metrics still on the devices
        self.unsaved = False  # whether a checkpoint is due that has not been saved

    def steps(self, state: S, batches: Iterator[Batch]) -> S:
        """Trains on the batches; `state` may be donated.

        Raises:
          Exception: raised by a callback.
          PreemptedError: on SIGTERM or Ctrl-C, after saving.
          TrainingError: a metric "finite" is 0.
        """
        every, clock = self.every, self.clock
        start = int(state.step)
        self.writer.progress(start)
        if start and distributed.preempted_before(start):
            raise distributed.stopped(f"before the first step after {start} of {every.total}")
        if (
            start
            and every.is_due(start, every.evaluate)
            and distributed.any_process(self.writer.active and not self.writer.has(start, "eval/"))
        ):
            self._evaluate(start, state)  # the run was ended between saving this step and evaluating it
        for step in range(start + 1, every.total + 1):
            begun, first = time.perf_counter(), step == start + 1
            with progress.activity("waiting for the first batch") if first else contextlib.nullcontext():
                rows = next(batches)
            waited, idle = time.perf_counter() - begun, self._is_idle()
            batch = sharding.put_batch(rows, self.mesh)  # with several processes, JAX counts this transfer as implicit
            # Explicit transfers only, of metrics from the devices: others would be host syncs.
            with jax.transfer_guard("disallow"):
                if self.profile is not None:
                    self.profile.before(step, [metrics for _, metrics in self.unread])
                state, metrics = self.task.step(state, batch)
                if self.profile is not None:
                    self.profile.after(step, metrics)
                begun = time.perf_counter()
                # While this step runs, the host prepares one more, or batches would pile up. The first step compiles.
                if self.unread or first:
                    jax.block_until_ready((self.unread[-1][1] if self.unread else metrics)["finite"])
                clock.step(waited, idle, time.perf_counter() - begun)
                fetched = self._fetch() if self.unread and self.unread[-1][0] % every.log == 0 else []
            self._report(fetched)
            self.unread.append((step, metrics))
            self.writer.progress(step)
            self.callbacks.step(step, state)
            stops, ended = distributed.preempted(step), self.callbacks.ended(step % every.log == 0)
            evaluates = every.is_due(step, every.evaluate)  # takes minutes, perhaps longer than a preemption notice
            if (
                stops
                or ended
                or evaluates
                or every.is_due(step, every.save)
                or (self.unsaved and step % every.log == 0)
            ):
                self._save(step, state, waits=stops or ended or step == every.total)
            if ended:
                self.writer.note(f"ended by a callback, saved at step {step} of {every.total}")
                break
            if stops and step < every.total:
                self.checkpoints.wait()
                raise distributed.stopped(f"saved at step {step} of {every.total}")
            if every.is_due(step, every.draw):
                self._read()
                with clock.pause("draw"), self.writer.pause("drawing pictures"):
                    try:
                        self.writer.image(step, *self.task.draw(state))
                    except memory.DoesNotFitError as error:  # a resumed run would end here again
                        self.writer.note(
                            f"warning: no picture of step {step}: {error}; or set config.log.samples_every=0"
                        )
            if evaluates:
                self._evaluate(step, state)
        self.callbacks.finish()
        return state

    def _save(self, step: int, state: S, waits: bool) -> None:
        """Saves a checkpoint, unless the previous one is still being written and this one can wait."""
        self._read()  # also checks that what is saved is finite
        with self.clock.pause("checkpoint"), self.writer.pause("saving a checkpoint"):
            if not waits and self.checkpoints.is_busy():
                if not self.unsaved:
                    self.writer.note(f"step {step}: deferred: the previous checkpoint is still being written")
                self.unsaved = True
                return
            if not self.writer.flush(seconds=10.0):  # a resumed run does not write these lines again
                self.writer.note(f"step {step}: metrics.jsonl is still being written")
            self.checkpoints.save(
                step,
                **self.task.items(state),
                meta={
                    "images": step * self.task.batch_size,
                    "productive_seconds": self.clock.productive,
                    "first_start": self.clock.first_start,
                    "numerics": numerics.recorded(),
                },
            )
            self.unsaved = False

    def _evaluate(self, step: int, state: S) -> None:
        assert self.task.evaluate is not None
        self._read()
        with self.clock.pause("eval"), self.writer.pause("evaluating"):
            try:
                self._log(step, self.task.evaluate(state))
            except memory.DoesNotFitError as error:  # as with pictures
                self.writer.note(f"warning: no evaluation of step {step}: {error}; or set config.eval.every=0")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self.callbacks.metrics(step, self.writer.scalars(step, values))

    def _is_idle(self) -> bool:
        """Whether the devices have finished all dispatched steps."""
        last: Any = self.unread[-1][1]["finite"] if self.unread else None
        return last is None or last.is_ready()

    def _read(self) -> None:
        """Fetches the metrics that are still on the devices and reports them."""
        self._report(self._fetch())

    def _fetch(self) -> list[tuple[int, dict[str, np.ndarray]]]:
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self.unread]
        self.unread = []
        return fetched

    def _report(self, fetched: list[tuple[int, dict[str, np.ndarray]]]) -> None:
        """Stops the run if any of the steps was not finite, and writes the lines that are due."""
        bad = [step for step, metrics in fetched if not metrics.pop("finite")]
        if bad:
            steps = self.checkpoints.steps()
            raise TrainingError(
                f"loss, gradient or parameters were not finite in step{'s' if len(bad) > 1 else ''} "
                f"{', '.join(map(str, bad[:10]))}{' and later' if len(bad) > 10 else ''}; "
                + (f"the newest checkpoint is of step {steps[-1]}. " if steps else "there is no checkpoint yet. ")
                + self.task.advice
            )
        for step, metrics in fetched:
            if step % self.every.log == 0:
                self._log(step, {**{name: float(value) for name, value in metrics.items()}, **self.clock.line()})
