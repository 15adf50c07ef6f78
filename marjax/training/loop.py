"""The training run, from a config and a work directory to a final state.

Nothing here knows a variant or a head. The order of the phases matters: what can be wrong with the config, the data
and the mesh is found before anything is written; the state is made sharded, so that no device ever holds all of it;
the data starts where the restored state stands.
"""

import math
import os
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath

from marjax import config as config_lib
from marjax import flops, peak, sharding
from marjax.checkpoints.manager import Checkpoints
from marjax.data.pipeline import Batches
from marjax.errors import TrainingError
from marjax.generation.images import beside, grid
from marjax.generation.sampler import Sampler, Settings
from marjax.metrics import MetricWriter
from marjax.models import generator as generator_lib
from marjax.tokenizers import open_tokenizer
from marjax.training import state as state_lib
from marjax.training.optimizer import make_optimizer
from marjax.training.state import TrainState
from marjax.training.step import Metrics, make_train_step


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> TrainState:
    """Trains until `config.train.steps`, resuming from the newest whole checkpoint in `workdir`.

    Args:
      config: as a config file returns it, or resolved.
      workdir: local path or gs:// address; made if need be.

    Returns:
      The final state, on the devices.

    Raises:
      UserError: a config, data set, work directory or checkpoint that cannot be used.
      TrainingError: a loss, gradient or parameter became infinite or NaN.
    """
    config = config_lib.resolve(config)

    # What may be wrong with the machine, the tokenizer or the data, before anything is written.
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch(mesh, config.train.batch_size, config.train.accumulate)
    tokens = config_lib.tokens_of(config)
    tokenizer = open_tokenizer(config.tokenizer)
    config = config_lib.resolve(config_lib.apply_overrides(config, {"tokenizer.checksum": tokenizer.checksum}))
    image = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, config.data.channels), "float32")
    jax.eval_shape(tokenizer.encode, tokenizer.params, image, jax.random.key(0))
    open_batches(config, start_step=0).close()
    config_lib.claim_workdir(workdir, config)

    # Shapes and shardings come before any array, so that initialisation and restore put each shard where it stays.
    generator = generator_lib.of(config, tokens)
    optimizer = make_optimizer(config.train)
    abstract = state_lib.abstract_state(generator, optimizer, mesh)
    train_step = make_train_step(config, generator, tokenizer, tokens, optimizer, abstract, mesh)
    sampler = Sampler(generator, tokenizer, tokens, Settings.of(config.sample, generator), mesh)

    with Checkpoints(epath.Path(workdir) / "checkpoints", keep=config.checkpoint.keep,
                     keep_every=config.checkpoint.keep_every) as checkpoints:
        restored = checkpoints.restore(checkpoint_items(abstract))
        if restored is None:
            state = state_lib.create(generator, optimizer, abstract, config.seed)
        else:
            items = restored.items
            state = TrainState(step=items["optimizer"]["step"], params=items["params"], ema=items["ema"],
                               opt_state=items["optimizer"]["opt_state"])
        start = int(state.step)
        writer = MetricWriter(workdir, start_step=start, total_steps=config.train.steps,
                              tensorboard=config.log.tensorboard, progress=config.log.progress,
                              active=jax.process_index() == 0)
        writer.note(f"{parameter_overview.count_parameters(abstract.params) / 1e6:.2f} M parameters, mesh "
                    f"{dict(mesh.shape)}, {jax.devices()[0].device_kind}; "
                    + (f"resuming at step {start} of {config.train.steps}" if restored else
                       f"{config.train.steps} steps"))
        try:
            with open_batches(config, start_step=start) as batches, jax.set_mesh(mesh):
                run = _Run(config, writer, checkpoints, sampler, flops.train_flops(generator), mesh.size)
                return run.steps(state, start, train_step, batches, tokenizer.params, mesh)
        finally:
            writer.close()


def open_batches(config: ml_collections.ConfigDict, start_step: int) -> Batches:
    """This process's part of the training batches from `start_step` on."""
    return Batches(config.data, config.train.batch_size, config.seed, start_step=start_step,
                   process_index=jax.process_index(), process_count=jax.process_count())


def checkpoint_items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint: sampling reads only one of the first two."""
    return {"params": state.params, "ema": state.ema,
            "optimizer": {"step": state.step, "opt_state": state.opt_state}}


class _Run:
    """The loop itself and what it does every so many steps."""

    def __init__(self, config: ml_collections.ConfigDict, writer: MetricWriter, checkpoints: Checkpoints,
                 sampler: Sampler, flops_per_image: float, chips: int) -> None:
        self.config, self.writer, self.checkpoints, self.sampler = config, writer, checkpoints, sampler
        self.flops_per_image, self.chips = flops_per_image, chips
        self.peak = peak.device_peak(config.model.dtype)
        self.unread: list[tuple[int, Metrics]] = []  # metrics still on the devices
        self.window_start: float | None = None  # None until the first step, which compiles, is through
        self.window_steps, self.window_wait = 0, 0.0

    def steps(self, state: TrainState, start: int, train_step: Any, batches: Batches, tokenizer_params: Any,
              mesh: Any) -> TrainState:
        config = self.config
        total, log = config.train.steps, config.log
        for step in range(start + 1, total + 1):
            before = time.perf_counter()
            batch = sharding.put_batch(next(batches), mesh)
            self.window_wait += time.perf_counter() - before
            state, metrics = train_step(state, batch, tokenizer_params)
            # Metrics of a step are read once the next is dispatched, so that the devices never wait for the host.
            if self.unread and self.unread[-1][0] % log.every == 0:
                self._read()
            self.unread.append((step, metrics))
            self.window_steps += 1
            self.writer.progress(step)
            if self.window_start is None:
                jax.block_until_ready(metrics)
                self._restart_clock()
            saves = step % config.checkpoint.every == 0 or step == total
            draws = log.samples_every and (step % log.samples_every == 0 or step == total)
            if saves or draws:
                self._read()  # also makes sure that what is saved is finite
            if saves:
                self.checkpoints.save(step, **checkpoint_items(state), meta={"images": step * config.train.batch_size})
            if draws:
                self._draw(step, state)
            if saves or draws:
                self._restart_clock()
        return state

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
                + "Lower config.train.lr or look at the data, then start again")
        for step, metrics in fetched:
            if step % self.config.log.every == 0:
                self.writer.scalars(step, {**metrics, **self._performance()})

    def _performance(self) -> dict[str, float]:
        if self.window_start is None or not self.window_steps:
            return {}
        elapsed = time.perf_counter() - self.window_start
        rate = self.window_steps * self.config.train.batch_size / elapsed / self.chips
        wait = self.window_wait / elapsed
        self._restart_clock()
        return {"perf/images_per_sec_per_chip": rate, "perf/mfu": rate * self.flops_per_image / self.peak,
                "data/wait_frac": wait}

    def _draw(self, step: int, state: TrainState) -> None:
        """A picture of the same samples, all classes in turn, from raw weights, left, and EMA weights, right."""
        size = self.config.sample.batch_size
        labels = np.arange(size) % self.config.data.num_classes
        columns = math.ceil(math.sqrt(min(size, 100)))
        drawn = [grid(self.sampler(params, labels, self.config.seed, batch_size=size)[:100], columns)
                 for params in (state.params, state.ema)]
        self.writer.image(step, "raw_and_ema", beside(drawn))
