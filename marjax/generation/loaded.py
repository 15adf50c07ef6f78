"""A work directory opened once, to be sampled from many times: for notebooks and other programs."""

import os
from typing import Any

import ml_collections
import numpy as np

from marjax import config as config_lib
from marjax import numerics
from marjax.generation.sample import checked_labels, opened_config, opened_sampler
from marjax.generation.sampler import Sampler
from marjax.paths import takes_paths
from marjax.ranges import check_arguments
from marjax.trees import PyTree


@numerics.pinned()
@takes_paths("workdir", "tokenizer_path")
def load(
    workdir: str | os.PathLike[str],
    *,
    weights: str | None = None,
    step: int | None = None,
    tokenizer_path: str | None = None,
    **settings: Any,
) -> "Loaded":
    """Opens a trained work directory: `marjax.load("runs/digits").sample([3, 7])`.

    Nothing that the work directory names is imported: a head, backbone or tokenizer of your own must be known by
    `marjax.register` first.

    Args:
      workdir: of a training run, or of `marjax convert`.
      weights: "ema" or "raw"; by default "ema", or what a converted work directory has.
      step: of the checkpoint, or None for the newest whole one.
      tokenizer_path: where the tokenizer's weights are now, if they have moved since the training.
      **settings: fields of `config.sample`, for all calls of `sample`; the run's config has the defaults.

    Raises:
      UserError: anything that cannot be used.
    """
    config = opened_config(workdir, tokenizer_path, settings)
    opened = opened_sampler(config, workdir, weights, step)
    return Loaded(config, opened.sampler, opened.params, opened.step, opened.weights, workdir)


class Loaded:
    """An opened work directory; made by `marjax.load`.

    Attributes:
      config: the run's resolved config, with the settings given to `load`.
      params: the weights, a tree of float32 arrays on the devices.
      step: of the checkpoint that they are from.
      weights: "ema" or "raw": which they are.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        sampler: Sampler,
        params: PyTree,
        step: int,
        weights: str,
        workdir: str | os.PathLike[str],
    ) -> None:
        self.config, self.params, self.step, self.weights = config, params, step, weights
        self._workdir = workdir  # which has the names of classes
        self._samplers = {sampler.settings.shape(): sampler}

    def __repr__(self) -> str:
        size, model = self.config.data.image_size, self.config.model
        return (
            f"<{model.variant} with head {model.head}, {self.config.data.num_classes} classes of {size} x {size} "
            f"pixels, {self.weights} weights of step {self.step}>"
        )

    @numerics.pinned()
    def sample(self, labels: Any, *, seed: int = 0, first_index: int = 0, **settings: Any) -> np.ndarray:
        """Images uint8 (N, H, W, C), one a label: the same as `marjax.sample` makes of the same arguments.

        The first call compiles, and so does one with another `num_iter`, `num_sampling_steps`, `confidence_order` or
        `max_stages`, the first with guidance, or the first with about twice as many labels; all others do not.

        Args:
          labels: as `marjax.sample` takes them.
          seed: of all randomness, in [0, 2^32).
          first_index: index of the first image.
          **settings: fields of `config.sample`, for this call.

        Raises:
          UserError: a label, setting or seed that cannot be used.
        """
        config = self.config
        if given := {f"sample.{key}": str(value) for key, value in settings.items() if value is not None}:
            config = config_lib.resolve(config_lib.apply_overrides(config, given))
        check_arguments(seed=seed, first_index=first_index)
        array = checked_labels(labels, config, self._workdir)
        sampler = next(iter(self._samplers.values())).with_settings(config.sample)
        sampler = self._samplers.setdefault(sampler.settings.shape(), sampler).with_settings(config.sample)
        # Powers of two: numbers of labels that differ a little share a program.
        rows = min(config.sample.batch_size, 1 << (len(array) - 1).bit_length())
        return sampler(self.params, array, seed, first_index, batch_size=rows)
