"""Trains a KL or VQ autoencoder and writes the file for `config.tokenizer.path`."""

import math
import os
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from marjax import config as config_lib
from marjax import distributed, memory, numerics, sharding
from marjax.checkpoints.manager import Checkpoints
from marjax.data.pipeline import Batches
from marjax.errors import UserError
from marjax.files import make_folder
from marjax.images import beside, grid, to_uint8
from marjax.lock import locked_file, locked_folder
from marjax.loggers import check_loggers
from marjax.paths import takes_paths
from marjax.tokenizer_training.autoencoder_step import AutoencoderState, Trainer, make_step
from marjax.tokenizer_training.reconstruction import measure, read_images
from marjax.tokenizers import autoencoder_file, make_tokenizer
from marjax.tokenizers.autoencoder_file import Stored
from marjax.tokenizers.spec import AUTOENCODERS, Spec, spec_of
from marjax.training.fit import compile_step, described_batch
from marjax.training.loop import Intervals, Start, Task, log_targets, run
from marjax.workdir import check_workdir, shared_settings, write_config

_COMMAND = "marjax train-tokenizer"
_SHOWN = 32  # images in a picture
_MEASURED_AT_ONCE = 32


@numerics.pinned()
@takes_paths("path", "workdir")
def train_autoencoder(
    config: ml_collections.ConfigDict,
    path: str | os.PathLike[str],
    *,
    workdir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains the network of `config.tokenizer` on `config.data`, and writes its EMA weights and scale to one file.

    A second start resumes from the newest checkpoint, bit-exact. The scale is 1 / standard deviation over all values
    of the latents (drawn from the posterior; for VQ before quantisation) of the first
    `config.tokenizer.train.scale_images` training images, without flips.

    Args:
      config: as a config file returns it, or resolved; reads `data`, `tokenizer`, `mesh`, `checkpoint` and `log`.
      path: the .safetensors file; its folder is created if missing.
      workdir: of checkpoints, metrics and pictures; by default `path` without its suffix.
      overwrite: whether to replace a file with other contents.

    Returns:
      The dict of `reconstruction.measure`, `path`, `checksum` and `seconds`; for VQ also `num_codes`.

    Raises:
      UserError: an invalid config, data set, work directory or file.
      TrainingError: a loss, gradient or parameter became infinite or NaN.
    """
    start = time.perf_counter()
    config = config_lib.resolve(config)
    if config.tokenizer.name not in AUTOENCODERS:
        raise UserError(
            f"config.tokenizer.name={config.tokenizer.name!r} has nothing to train; use codebook or one of "
            f"{', '.join(sorted(AUTOENCODERS))}"
        )
    if not os.fspath(path).endswith(".safetensors"):
        raise UserError(f"{path} does not end in .safetensors, the format of autoencoders")
    folder = epath.Path(os.fspath(path).removesuffix(".safetensors") if workdir is None else workdir)
    check_loggers(log_targets(config))
    train, spec = config.tokenizer.train, spec_of(config_lib.tokenizer_config(config), config.data.channels)
    mesh = sharding.near_mesh(config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch(mesh, train.batch_size, 1)
    trainer = Trainer.from_config(config, spec)
    abstract = jax.eval_shape(trainer.init, numerics.key(config.seed))
    image = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, config.data.channels), "float32")
    jax.eval_shape(trainer.forward, abstract.params, image, numerics.key(0))
    with _open_batches(config, mesh, 0) as batches:
        batch = described_batch(batches.examples, train.batch_size, mesh)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        finished = train.steps in checkpoints.steps()
    if not finished and not overwrite and epath.Path(path).exists():
        raise UserError(
            f"{path} exists, and {folder} is not a finished run that wrote it; give another --out or --overwrite it"
        )
    make_folder(epath.Path(path).parent)  # fails before the work
    about = distributed.check(mesh, shared_settings(config))
    with distributed.first_holds(locked_folder(folder, _COMMAND)):
        distributed.on_first(lambda: check_workdir(folder, config, tokenizer=True))
        state = _run(config, folder, trainer, abstract, batch, mesh, about)
        stored = Stored(spec, jax.device_get(state.ema), 1.0, "")
        report = _measured(config, stored)
        report |= {
            "path": os.fspath(path),
            "checksum": _write(path, stored, report["scale"], overwrite),
            "seconds": time.perf_counter() - start,
        }
    return report | ({"num_codes": spec.num_codes} if spec.num_codes else {})


def _run(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    trainer: Trainer,
    abstract: AutoencoderState,
    batch: Any,
    mesh: Mesh,
    about: str,
) -> AutoencoderState:
    train, replicated = config.tokenizer.train, sharding.replicated(mesh)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), abstract)
    step = compile_step(
        make_step(trainer, abstract, mesh),
        abstract,
        batch,
        params=abstract.params,
        batch=memory.Batch(
            "config.tokenizer.train.batch_size",
            train.batch_size,
            sharding.batch_shards(mesh),
            others=lambda most: [] if train.remat else ["set config.tokenizer.train.remat=true"],
        ),
    )
    distributed.on_first(lambda: write_config(workdir, config))  # after the check that the step fits into memory
    task = Task(
        Intervals(train.steps, train.log_every, train.checkpoint_every, train.pictures_every),
        train.batch_size,
        step,
        _items,
        lambda state: ("reconstructions", _picture(config, trainer.spec, state)),
        "Lower config.tokenizer.train.lr or look at the data, then start again",
    )
    init = jax.jit(trainer.init, out_shardings=jax.tree.map(lambda _: replicated, abstract))
    start = Start(
        abstract,
        lambda: init(numerics.key(config.seed)),
        _restore,
        lambda first: _open_batches(config, mesh, first),
        (about,),
    )
    return run(task, start, config, workdir, mesh)


def _restore(items: dict[str, Any]) -> AutoencoderState:
    rest = dict(items["optimizer"])
    return AutoencoderState(step=rest.pop("step"), params=items["params"], ema=items["ema"], rest=rest)


def _open_batches(config: ml_collections.ConfigDict, mesh: Mesh, start_step: int) -> Batches:
    batch_size = config.tokenizer.train.batch_size
    return Batches(
        config_lib.data_config(config),
        batch_size,
        config.seed,
        start_step=start_step,
        rows=sharding.rows_held(mesh, batch_size),
    )


def _items(state: AutoencoderState) -> dict[str, Any]:
    """The items of a checkpoint."""
    return {"params": state.params, "ema": state.ema, "optimizer": {"step": state.step, **state.rest}}


def _tokenizer(stored: Stored) -> Any:
    """The tokenizer with continuous latents, whose scale is measured; for VQ those before quantisation."""
    return make_tokenizer("vq_continuous" if stored.spec.num_codes else "kl", stored)


def _measured(config: ml_collections.ConfigDict, stored: Stored) -> dict[str, Any]:
    """Measures the training images and the scale."""
    images = read_images(config_lib.data_config(config), _MEASURED_AT_ONCE)
    report, _, _ = measure(_tokenizer(stored), images, config.tokenizer.train.scale_images, config.seed)
    if not math.isfinite(report["scale"]):
        raise UserError(
            "all latents are equal; look at the pictures in the work directory, and train longer or with other "
            "config.tokenizer.train"
        )
    return report


def _picture(config: ml_collections.ConfigDict, spec: Spec, state: AutoencoderState) -> np.ndarray:
    """The first images of the data, left, beside their reconstructions by raw and EMA weights."""
    with Batches(config_lib.data_config(config), _SHOWN, 0, train=False) as batches:
        original = next(batches)["image"][: min(_SHOWN, batches.num_examples)]
    tokenizer = _tokenizer(Stored(spec, None, 1.0, ""))

    @jax.jit
    def back(params: Any, image: jax.Array) -> jax.Array:
        image = image.astype("float32") / 127.5 - 1.0
        return tokenizer.decode(params, tokenizer.encode(params, image, numerics.key(0)))

    pictures = [
        to_uint8(jax.device_get(back(jax.device_get(params), original))) for params in (state.params, state.ema)
    ]
    columns = math.ceil(math.sqrt(len(original)))
    return beside([grid(each, columns) for each in (original, *pictures)])


def _write(path: str | os.PathLike[str], stored: Stored, scale: float, overwrite: bool) -> str:
    """Writes the file, unless it exists; returns its checksum."""
    checksum = autoencoder_file.checksum(autoencoder_file.to_state_dict(stored.spec, stored.params), scale)

    def write() -> None:
        with locked_file(path, _COMMAND):
            if overwrite or not epath.Path(path).exists():
                autoencoder_file.write(path, stored.spec, stored.params, scale)
            elif autoencoder_file.read(path).checksum != checksum:
                raise UserError(
                    f"{path} holds another autoencoder than this run trained; give another --out or --overwrite it"
                )

    distributed.on_first(write)
    return checksum
