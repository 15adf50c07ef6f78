"""The sample grid drawn during training, sized to a small fraction of the training FLOPs."""

import dataclasses
import math

import ml_collections
import numpy as np

from marjax.generation.plan import generation_plan
from marjax.generation.sampler import Sampler
from marjax.images import beside, grid
from marjax.models.generator import Generator
from marjax.perf import flops
from marjax.trees import PyTree
from marjax.variants import VARIANTS

_SHARE = 0.02  # of the training FLOPs between two pictures
_FEWEST, _MOST = 10, 100  # samples per kind of weights; with fewer than _FEWEST classes, one per class
_FEWEST_STEPS = 8  # of num_iter


@dataclasses.dataclass(frozen=True)
class Picture:
    """The size and settings of the picture, a function of the config alone.

    Attributes:
      count: number of samples from raw weights, and from EMA weights.
      sample: a resolved `config.sample`, with `num_iter` reduced if `count` is too expensive otherwise.
      share: FLOPs of a picture over training FLOPs between two pictures; 0 if unknown.
      every: steps between two pictures.
      num_classes: number of classes, which alternate.
    """

    count: int
    sample: ml_collections.ConfigDict
    share: float
    every: int
    num_classes: int

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict, generator: Generator) -> "Picture":
        """The picture of a resolved config."""
        every = min(config.log.samples_every or config.train.steps, config.train.steps)
        num_classes = config.data.num_classes
        fewest = min(_FEWEST, num_classes, config.sample.batch_size)
        steps = flops.train_flops(generator) * config.train.batch_size * every
        num_iter = config.sample.num_iter
        while True:
            sample = config.sample.copy_and_resolve_references()
            with sample.unlocked():
                sample.num_iter = num_iter
            plan = generation_plan(generator.num_tokens, num_iter)
            one = (
                2
                * flops.sample_flops(
                    generator, plan, sample.num_sampling_steps, sample.cfg != 1.0, sample.confidence_order
                )
                / max(steps, 1.0)
            )
            affordable = math.floor(_SHARE / one) if one else fewest
            if affordable >= fewest or not VARIANTS[config.model.variant].many or num_iter <= _FEWEST_STEPS:
                break
            num_iter = max(_FEWEST_STEPS, num_iter // 2)
        count = max(fewest, min(affordable, _MOST, config.sample.batch_size))
        if count > num_classes:
            count -= count % num_classes  # equally many per class
        return cls(count, sample, count * one, every, num_classes)

    def __str__(self) -> str:
        share = f"; {self.share:.1%} of the FLOPs of training" if self.share else ""
        return (
            f"pictures every {self.every} steps: {self.count} samples of raw and of EMA weights, num_iter "
            f"{self.sample.num_iter}{share}"
        )

    def draw(self, sampler: Sampler, params: PyTree, ema: PyTree, seed: int) -> np.ndarray:
        """Samples all classes in turn from raw weights (left) and EMA weights (right); uint8 (H, W, 3)."""
        labels = np.arange(self.count) % self.num_classes
        side = math.sqrt(self.count)
        columns = math.ceil(side)
        if self.num_classes <= self.count:  # each class stays in its columns
            columns = self.num_classes * max(1, round(side / self.num_classes))
        return beside([grid(sampler(each, labels, seed, batch_size=self.count), columns) for each in (params, ema)])
