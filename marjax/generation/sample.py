"""Samples from a work directory: what `marjax sample` does, as a function."""

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


@numerics.pinned()
@takes_paths("workdir", "tokenizer_path")
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
    """Images uint8 (N, H, W, C), one a label; the i-th depends only on (weights, settings, seed, first_index + i).

    Args:
      workdir: of a training run.
      labels: classes, by number or by name; -1 asks for no class. A single one makes one image.
      seed: of all randomness, in [0, 2^32).
      weights: "ema" or "raw"; by default "ema", or what a converted work directory has.
      step: of the checkpoint, or None for the newest whole one.
      first_index: index of the first image.
      tokenizer_path: where the tokenizer's weights are now, if they have moved since the training.
      **settings: fields of `config.sample` (`num_iter`, `num_sampling_steps`, `cfg`, `cfg_schedule`, `temperature`,
        `batch_size`, `confidence_order`, `choice_temperature`); the run's config has the defaults.

    Raises:
      UserError: anything that cannot be used, before any work is done.
    """
    return sampled(
        workdir,
        labels,
        seed=seed,
        weights=weights,
        step=step,
        first_index=first_index,
        tokenizer_path=tokenizer_path,
        **settings,
    ).images


class Sampled(NamedTuple):
    """Samples, and what they were made with.

    Attributes:
      images: uint8 (N, H, W, C).
      labels: int64 (N,).
      settings: the resolved `config.sample`.
      weights: "ema" or "raw".
      step: of the checkpoint.
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
    """The same as `sample`, with what the images were made with."""
    config = opened_config(workdir, tokenizer_path, settings)
    check_arguments(seed=seed, step=step, first_index=first_index)
    labels = checked_labels(labels, config, workdir)
    opened = opened_sampler(config, workdir, weights, step)
    images = opened.sampler(
        opened.params, labels, seed, first_index, batch_size=min(config.sample.batch_size, len(labels))
    )
    return Sampled(images, labels, config.sample, opened.weights, opened.step)


def checked_labels(given: Any, config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> np.ndarray:
    """The labels that a user asks a run's model for, int64 (N,), N at least 1. Raises UserError."""
    labels = _checked_labels(class_names.classes_of(given, workdir, config.data.num_classes))
    wrong = [int(label) for label in labels if not (label == UNCONDITIONAL or 0 <= label < config.data.num_classes)]
    if wrong:
        raise UserError(
            f"label {wrong[0]} is out of range: this model has classes 0 to {config.data.num_classes - 1} "
            f"(and -1 for no class)"
        )
    return labels.astype(np.int64)


def _checked_labels(given: Any) -> np.ndarray:
    """Integers (N,), N at least 1. Raises UserError."""
    try:
        labels = np.asarray(given)
    except ValueError:  # lists of several lengths
        labels = np.asarray(given, object)
    if not labels.size:
        raise UserError("no labels: give at least one class, or -1 for none")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"labels is {shown(given)}: give a list of classes, by number or by name")
    return labels


class Opened(NamedTuple):
    """A work directory ready to be sampled from.

    Attributes:
      sampler: with its settings.
      params: what it takes.
      step: of the checkpoint.
      weights: "ema" or "raw": which these are.
      digest: a hash of them.
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
    """The sampler of a work directory and the parameters it takes, for many calls with one program.

    Args and errors are those of `sample`; with `local`, it runs on this process's devices alone, at its own pace.
    """
    return opened_sampler(opened_config(workdir, tokenizer_path, settings), workdir, weights, step, local)


def opened_sampler(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    weights: str | None,
    step: int | None,
    local: bool = False,
) -> Opened:
    """The sampler of a work directory for its config, as `opened_config` gives it; see `open_sampler`."""
    check_arguments(step=step)
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights is {weights!r}: give 'ema' or 'raw'")
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
    """The resolved config of a work directory with those fields of `config.sample`. Raises UserError."""
    given = {f"sample.{key}": str(value) for key, value in settings.items() if value is not None}
    if tokenizer_path is not None:
        given["tokenizer.path"] = tokenizer_path
    return config_lib.resolve(config_lib.apply_overrides(read_workdir(workdir), given))
