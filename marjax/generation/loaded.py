"""`marjax.load`: opens a work directory once and samples from it many times, for notebooks and programs."""

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

    Code named by the work directory is never imported: call `marjax.register` first for a custom head, backbone or
    tokenizer.

    Args:
      workdir: work directory of a training run or of `marjax convert`.
      weights: "ema" or "raw"; by default "ema" if the checkpoint has it.
      step: checkpoint step; by default the newest complete checkpoint.
      tokenizer_path: path of the tokenizer's weights, if they have moved since training.
      **settings: fields of `config.sample` for all calls of `sample`; defaults come from the run's config.

    Raises:
      UserError: invalid arguments or files.
    """
    config = opened_config(workdir, tokenizer_path, settings)
    opened = opened_sampler(config, workdir, weights, step)
    return Loaded(config, opened.sampler, opened.params, opened.step, opened.weights, workdir)


class Loaded:
    """A work directory opened by `marjax.load`.

    Attributes:
      config: the run's resolved config with the settings passed to `load`.
      params: the weights, a tree of float32 arrays on the devices.
      step: step of the checkpoint.
      weights: "ema" or "raw".
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
        self._workdir = workdir  # class names are read from it
        self._samplers = {sampler.settings.shape(): sampler}

    def __repr__(self) -> str:
        size, model = self.config.data.image_size, self.config.model
        return (
            f"<{model.variant} with head {model.head}, {self.config.data.num_classes} classes of {size} x {size} "
            f"pixels, {self.weights} weights of step {self.step}>"
        )

    @numerics.pinned()
    def sample(self, labels: Any, *, seed: int = 0, first_index: int = 0, **settings: Any) -> np.ndarray:
        """Samples one image per label, uint8 (B, H, W, C): the same images as `marjax.sample`.

        The first call compiles, as does the first with a new `num_iter`, `num_sampling_steps`, `confidence_order` or
        `max_stages`, with cfg switched on or off, or with about twice as many labels.

        Args:
          labels: see `marjax.sample`.
          seed: in [0, 2^32).
          first_index: index of the first image.
          **settings: fields of `config.sample` for this call.

        Raises:
          UserError: an invalid label, setting or seed.
        """
        config = self.config
        if given := {f"sample.{key}": str(value) for key, value in settings.items() if value is not None}:
            config = config_lib.resolve(config_lib.apply_overrides(config, given))
        check_arguments(seed=seed, first_index=first_index)
        array = checked_labels(labels, config, self._workdir)
        sampler = next(iter(self._samplers.values())).with_settings(config.sample)
        sampler = self._samplers.setdefault(sampler.settings.shape(), sampler).with_settings(config.sample)
        # Rounded up to a power of two, so that similar numbers of labels share a program.
        rows = min(config.sample.batch_size, 1 << (len(array) - 1).bit_length())
        return sampler(self.params, array, seed, first_index, batch_size=rows)
