"""Small evaluations of the EMA weights during training, without and with guidance.

Their distances show the trend but differ from those of `marjax evaluate`, because distances grow as the number of
samples falls.
"""

from typing import Any

import ml_collections
import numpy as np

from marjax.evaluation.across_processes import all_processes
from marjax.evaluation.networks.open_extractor import open_extractor
from marjax.evaluation.score import check_fits, score
from marjax.evaluation.statistics import read_statistics
from marjax.generation.sampler import Sampler


class Probe:
    """Measures EMA weights as `config.eval` says, always with the same sample indices."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        """Opens the extractor and the dataset statistics of a resolved config. Raises UserError."""
        self._settings, self._sample, self._seed = config.eval, config.sample, config.seed
        self._num_classes = config.data.num_classes
        self._extractor = open_extractor(config.eval.extractor, config.eval.extractor_path)
        self._statistics = read_statistics(config.eval.statistics)
        self._samplers: dict[str, Sampler] = {}
        check_fits(self._extractor, self._statistics, config.data.image_size, config.data.channels)

    def __call__(self, sampler: Sampler, params: Any) -> dict[str, float]:
        """Samples and measures; every process must call it.

        Returns:
          `eval/num_images`; `eval/fid` and the other metrics of `score`, measured without guidance; and, if
          `config.eval.cfg` is not 1, `eval/fid_guided` and the others with guidance.
        """
        total, cfg = self._settings.num_images, self._settings.cfg
        if not self._samplers:  # kept, because each compiles its own program
            scales = {"": 1.0} | ({"_guided": cfg} if cfg != 1.0 else {})
            self._samplers = {suffix: sampler.with_settings(self._with_cfg(scale)) for suffix, scale in scales.items()}
        processes = all_processes()
        labels = np.arange(total) % self._num_classes
        mine = np.array(processes.share(total))
        metrics: dict[str, float] = {"eval/num_images": total}
        for suffix, each in self._samplers.items():
            images = each(params, labels, self._seed, batch_size=self._sample.batch_size)
            found = score(
                [(mine, images[mine])],
                total,
                self._extractor,
                self._statistics,
                processes,
                num_classes=self._num_classes,
            )
            metrics |= {f"eval/{name}{suffix}": value for name, value in found.items()}
        return metrics

    def _with_cfg(self, cfg: float) -> ml_collections.ConfigDict:
        sample = self._sample.copy_and_resolve_references()
        with sample.unlocked():
            sample.cfg = cfg
        return sample
