"""The training run, from a config and a work directory to a final state.

Nothing here knows a variant or a head. The order of the phases matters: config, data and mesh are validated before
anything is written; the state is created sharded, so that no device ever holds all of it; the data starts at the step
of the restored state.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from marjax import config as config_lib
from marjax import distributed, numerics, sharding
from marjax.assembly import assemble
from marjax.data.examples import Examples, Images
from marjax.data.latent_cache.read import Latents
from marjax.data.pipeline import Batches
from marjax.data.preprocess import Preprocess
from marjax.data.python_source import fingerprint_of, is_registered
from marjax.data.sources import open_source
from marjax.evaluation.during_training import Probe
from marjax.generation.sampler import Sampler
from marjax.lock import locked_folder
from marjax.loggers import Logger, check_loggers
from marjax.paths import takes_paths
from marjax.perf import flops, peak
from marjax.training import init_from as init_from_lib
from marjax.training import state as state_lib
from marjax.training.callbacks import Callbacks, OnMetrics, OnStep
from marjax.training.fit import compile_step, described_batch, training_batch
from marjax.training.latent_cache import open_fitting
from marjax.training.loop import Intervals, Start, Task, log_targets, run
from marjax.training.picture import Picture
from marjax.training.profile import Profile
from marjax.training.state import TrainState
from marjax.training.step import make_train_step
from marjax.trees import PyTree
from marjax.workdir import check_workdir, refuse_weights_alone, shared_settings, write_config


@numerics.pinned()
@takes_paths("workdir", "init_from")
def train(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    data: Any = None,
    profile: tuple[int, int] | None = None,
    init_from: str | os.PathLike[str] | None = None,
    on_metrics: OnMetrics | None = None,
    on_step: OnStep | None = None,
    loggers: Sequence[Logger] = (),
) -> TrainState:
    """Trains until `config.train.steps`, resuming from the newest whole checkpoint in `workdir`.

    With several processes (see `marjax/distributed.py`) all of them call this, with the same config.

    Args:
      config: as a config file returns it, or resolved.
      workdir: local path or gs:// address; created if missing. All processes of a run must see the same one.
      data: the images and labels to train on, instead of `config.data.source`: (images, labels), with images uint8
        (N, H, W, C) or a list of uint8 (H, W, C) of any sizes, labels integers (N,); or any object with `__len__` and
        `__getitem__(i)` that gives (image, label) or {"image": image, "label": label}. They are cropped to
        `config.data.image_size` and converted to `config.data.channels`; `config.data.num_classes` is derived where it
        is None. A resumed run must be given the same data.
      on_metrics: called as on_metrics(step, metrics) for every line of metrics, every `config.log.every` steps and
        after an evaluation, with finite floats by name such as "train/loss". They are read while later steps run, so
        the call does not hold up the devices.
      on_step: called as on_step(step, state) after every step that is dispatched. Reading the state waits for the
        devices; its arrays are donated to the next step, so copy what is kept (`jax.device_get(state.ema)`).
        A callback that returns True ends the run, which saves first. One that raises ends it too, and the exception is
        raised once the run is saved. Of several processes, each calls its own.
      loggers: of the first process, objects with the methods of `marjax.loggers.Logger`; beside those of `config.log`.
      profile: the first and the last step of a trace, written below the work directory.
      init_from: work directory of converted weights or of another run, whose weights a new run starts from; sets
        `config.init.path`. To resume, give the same or none.

    Returns:
      The final state, on the devices.

    Raises:
      UserError: a config, data set, work directory or checkpoint that cannot be used, or a work directory that another
        process writes.
      PreemptedError: SIGTERM came to a process that listens for it (`distributed.start`), and the run has saved.
      TrainingError: a loss, gradient or parameter became infinite or NaN.
    """
    callbacks, source = Callbacks(on_metrics, on_step), None
    if init_from:
        config = config_lib.apply_overrides(config, {"init.path": init_from})
    if data is not None:
        config, source = config_lib.with_data(config, data)
    config = config_lib.resolve(config)
    if source is None and not config.data.cache and is_registered(config.data.source):
        source = open_source(config_lib.data_config(config))
        config = config_lib.apply_overrides(config, {"data.fingerprint": fingerprint_of(source)})
    refuse_weights_alone(workdir, f"train(config, {f'{workdir}_finetuned'!r}, init_from={workdir!r})")

    check_loggers(log_targets(config), loggers)
    # Validate the machine, the tokenizer and the data before writing anything.
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch(mesh, config.train.batch_size, config.train.accumulate)
    tokenizer = assemble(config, mesh).tokenizer
    config = config_lib.resolve(config_lib.apply_overrides(config, {"tokenizer.checksum": tokenizer.checksum}))
    image = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, config.data.channels), "float32")
    jax.eval_shape(tokenizer.encode, tokenizer.params, image, numerics.key(0))
    examples: Examples | None = None
    if source is not None:
        examples = Images(source, Preprocess(config.data.image_size, config.data.channels, config.data.flip))
    if config.data.cache:
        examples = Latents(config.data.cache, open_fitting(config, tokenizer), config.data.flip)
    with open_batches(config, mesh, start_step=0, examples=examples) as batches:
        names = batches.class_names
        batch = described_batch(batches.examples, config.train.batch_size, mesh)
    probe = Probe(config) if config.eval.every else None
    tracer = None if profile is None else Profile(*profile, workdir, config.train.steps)
    about = distributed.check(mesh, shared_settings(config))
    config, weights = init_from_lib.prepare(config, workdir, mesh)
    assembly = assemble(config, mesh).replace(tokenizer=tokenizer)
    with distributed.first_holds(locked_folder(workdir, "marjax train")):
        distributed.on_first(lambda: check_workdir(workdir, config))
        # Shapes and shardings come before any array, so that initialisation and restore put each shard where it stays.
        sampler = Sampler(assembly)
        train_step = compile_step(
            make_train_step(assembly),
            assembly.state,
            batch,
            sampler.tokenizer_params,
            params=assembly.state.params,
            batch=training_batch(config, mesh),
            weights=weights,
        )
        distributed.on_first(lambda: write_config(workdir, config, names))  # written once it is known to fit
        picture = Picture.from_config(config, assembly.generator)
        painter = sampler.with_settings(picture.sample)
        log = config.log
        task = Task(
            Intervals(config.train.steps, log.every, config.checkpoint.every, log.samples_every, config.eval.every),
            config.train.batch_size,
            lambda state, batch: train_step(state, batch, sampler.tokenizer_params),
            checkpoint_items,
            lambda state: ("raw_and_ema", picture.draw(painter, state.params, state.ema, config.seed)),
            "Lower config.train.lr or look at the data, then start again",
            None if probe is None else lambda state: probe(sampler, state.ema),
            flops.train_flops(assembly.generator) / peak.device_peak(config.model.dtype),
        )

        def create() -> TrainState:
            made = state_lib.create(assembly.generator, assembly.optimizer, assembly.state, config.seed, weights)
            weights.clear()  # one copy stays
            return made

        start = Start(
            assembly.state,
            create,
            lambda items: TrainState(params=items["params"], ema=items["ema"], **items["optimizer"]),
            lambda step: open_batches(config, mesh, step, examples),
            (
                about,
                sharding.overview(assembly.params) if mesh.size > 1 else "",
                str(picture) if log.samples_every else "",
            ),
        )
        final: TrainState = run(
            task, start, config, workdir, mesh, callbacks=callbacks, loggers=loggers, profile=tracer
        )
        return final


def open_batches(
    config: ml_collections.ConfigDict, mesh: Mesh, start_step: int, examples: Examples | None = None
) -> Batches:
    """This process's part of the training batches from `start_step` on, of `examples` or else of the images."""
    return Batches(
        config_lib.data_config(config),
        config.train.batch_size,
        config.seed,
        start_step=start_step,
        rows=sharding.rows_held(mesh, config.train.batch_size),
        examples=examples,
    )


def checkpoint_items(state: TrainState) -> dict[str, PyTree]:
    """The state as the items of a checkpoint: sampling reads only one of the first two."""
    return {"params": state.params, "ema": state.ema, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
