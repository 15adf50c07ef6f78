"""`marjax.sample`: samples images from a work directory."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from marjax import class_names, numerics, sharding
from marjax import config as config_lib
from marjax.assembly import assemble
from marjax.checkpoints.manager import Checkpoints
from marjax.errors import UserError
from marjax.generation.sampler import UNCONDITIONAL, Sampler
from marjax.paths import takes_paths
from marjax.ranges import check_arguments, shown
from marjax.trees import PyTree
from marjax.workdir import no_checkpoints, read_workdir


def sample(
    workdir: str | os.PathLike[str],
    labels: int | str | Sequence[int | str] | np.ndarray,
    *,
    seed: int = 0,
    weights: str | None = None,
    step: int | None = None,
    first_index: int = 0,
    tokenizer_path: str | None = None,
    **settings: Any,
) -> np.ndarray:
    """Samples one image per label, uint8 (B, H, W, C); image i depends on (weights, settings, seed, first_index + i).

    Args:
      workdir: work directory of a training run or of `marjax convert`.
      labels: one class or several, by number or name; -1 is the null class.
      seed: in [0, 2^32).
      weights: "ema" or "raw"; by default "ema" if the checkpoint has it.
      step: checkpoint step; by default the newest complete checkpoint.
      first_index: index of the first image.
      tokenizer_path: path of the tokenizer's weights, if they have moved since training.
      **settings: fields of `config.sample` (`num_iter`, `num_sampling_steps`, `cfg`, `cfg_schedule`, `temperature`,
        `batch_size`, `confidence_order`, `choice_temperature`); defaults come from the run's config.

    Raises:
      UserError: invalid arguments or files, before sampling starts.
    """
    which: dict[str, Any] = dict(weights=weights, step=step, tokenizer_path=tokenizer_path)
    return sampled(workdir, labels, seed=seed, first_index=first_index, **which, **settings).images


class Sampled(NamedTuple):
    """Samples and their provenance.

    Attributes:
      images: uint8 (B, H, W, C).
      labels: int64 (B,).
      settings: the resolved `config.sample`.
      weights: "ema" or "raw".
      step: checkpoint step.
    """

    images: np.ndarray
    labels: np.ndarray
    settings: ml_collections.ConfigDict
    weights: str
    step: int


@numerics.pinned()
@takes_paths("workdir", "tokenizer_path")
def sampled(
    workdir: str | os.PathLike[str],
    labels: int | str | Sequence[int | str] | np.ndarray,
    *,
    seed: int = 0,
    weights: str | None = None,
    step: int | None = None,
    first_index: int = 0,
    tokenizer_path: str | None = None,
    **settings: Any,
) -> Sampled:
    """Samples as `sample` does, and also returns the settings, weights and step in use."""
    config = opened_config(workdir, tokenizer_path, settings)
    check_arguments(seed=seed, step=step, first_index=first_index)
    labels = checked_labels(labels, config, workdir)
    opened = opened_sampler(config, workdir, weights, step)
    images = opened.sampler(
        opened.params, labels, seed, first_index, batch_size=min(config.sample.batch_size, len(labels))
    )
    return Sampled(images, labels, config.sample, opened.weights, opened.step)


def checked_labels(given: Any, config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> np.ndarray:
    """Validates labels given by number or name: int64 (B,), not empty. Raises UserError."""
    num_classes = config.data.num_classes
    given = class_names.classes_of(given, workdir, num_classes)
    try:
        labels = np.asarray(given)
    except ValueError:  # ragged lists
        labels = np.asarray(given, object)
    if not labels.size:
        raise UserError("labels is empty; give at least one class, or -1 for the null class")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"labels={shown(given)} is invalid; give a list of classes, by number or name")
    wrong = [int(label) for label in labels if not (label == UNCONDITIONAL or 0 <= label < num_classes)]
    if wrong:
        raise UserError(f"label {wrong[0]} is out of range; use 0 to {num_classes - 1}, or -1 for the null class")
    return labels.astype(np.int64)


class Opened(NamedTuple):
    """A work directory ready for sampling.

    Attributes:
      sampler: the compiled sampler.
      params: the weights.
      step: checkpoint step.
      weights: "ema" or "raw".
      digest: hash of the weights.
    """

    sampler: Sampler
    params: PyTree
    step: int
    weights: str
    digest: str


@numerics.pinned()
@takes_paths("workdir", "tokenizer_path")
def open_sampler(
    workdir: str | os.PathLike[str],
    *,
    weights: str | None = None,
    step: int | None = None,
    tokenizer_path: str | None = None,
    local: bool = False,
    **settings: Any,
) -> Opened:
    """Opens a work directory for many sampler calls that share one program.

    Arguments and errors are those of `sample`; with `local`, the sampler uses only the devices of this process.
    """
    return opened_sampler(opened_config(workdir, tokenizer_path, settings), workdir, weights, step, local)


def opened_sampler(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    weights: str | None,
    step: int | None,
    local: bool = False,
) -> Opened:
    """As `open_sampler`, with a config from `opened_config`."""
    check_arguments(step=step)
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights={weights!r} is invalid; use 'ema' or 'raw'")
    mesh = sharding.near_mesh(config.mesh.fsdp, config.mesh.tensor, jax.local_devices() if local else None)
    assembly = assemble(config, mesh)
    sampler = Sampler(assembly)
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise no_checkpoints(workdir)
    with Checkpoints(folder, read_only=True) as checkpoints:
        item = "params" if weights == "raw" or (weights is None and "ema" not in checkpoints.trees(step)) else "ema"
        restored = checkpoints.restore({item: assembly.params}, step)
    if restored is None:
        raise no_checkpoints(workdir)
    return Opened(
        sampler, restored.items[item], restored.step, {"ema": "ema", "params": "raw"}[item], restored.digests[item]
    )


def opened_config(
    workdir: str | os.PathLike[str], tokenizer_path: str | None, settings: dict[str, Any]
) -> ml_collections.ConfigDict:
    """The resolved config of a work directory, with `settings` in `config.sample`. Raises UserError."""
    given = {f"sample.{key}": str(value) for key, value in settings.items() if value is not None}
    if tokenizer_path is not None:
        given["tokenizer.path"] = tokenizer_path
    return config_lib.resolve(config_lib.apply_overrides(read_workdir(workdir), given))
