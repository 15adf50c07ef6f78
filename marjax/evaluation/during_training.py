"""The smaller evaluation of a training run: some samples every so many steps, without guidance and with.

Its distances are not those of `marjax evaluate`, since they grow as the number of samples falls; they show how a run
goes on.
"""

from typing import Any

import ml_collections
import numpy as np

from marjax.evaluation.across_processes import all_processes
from marjax.evaluation.networks.extractor import open_extractor
from marjax.evaluation.score import check_fits, score
from marjax.evaluation.statistics import read_statistics
from marjax.generation.sampler import Sampler


class Probe:
    """Measures EMA weights by `config.eval`; the samples are the same ones every time."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        """Opens extractor and statistics.

        Args:
          config: resolved.

        Raises:
          UserError: either cannot be used.
        """
        self.config = config
        self.extractor = open_extractor(config.eval.extractor, config.eval.extractor_path)
        self.statistics = read_statistics(config.eval.statistics)
        self._samplers: dict[str, Sampler] = {}
        check_fits(self.extractor, self.statistics, config.data.image_size, config.data.channels)

    def __call__(self, sampler: Sampler, params: Any) -> dict[str, float]:
        """`eval/fid` and so on, without guidance, and `eval/fid_guided` and so on, where `config.eval.cfg` is not 1.

        Other features than Inception's give other names (see `evaluation.names`); `eval/num_images` is their number.
        With several processes, all must call this.
        """
        config, processes = self.config, all_processes()
        found: dict[str, float] = {"eval/num_images": config.eval.num_images}
        if not self._samplers:  # kept, since each has a program of its own
            self._samplers = {"": sampler.with_settings(self._sample(1.0))}
            if config.eval.cfg != 1.0:
                self._samplers["_guided"] = sampler.with_settings(self._sample(config.eval.cfg))
        labels = np.arange(config.eval.num_images) % config.data.num_classes
        mine = np.arange(processes.index, len(labels), processes.count)
        for suffix, each in self._samplers.items():
            images = each(params, labels, config.seed, batch_size=config.sample.batch_size)
            metrics = score(
                [(mine, images[mine])],
                len(images),
                self.extractor,
                self.statistics,
                processes,
                num_classes=config.data.num_classes,
            )
            found |= {f"eval/{name}{suffix}": value for name, value in metrics.items()}
        return found

    def _sample(self, cfg: float) -> ml_collections.ConfigDict:
        sample = self.config.sample.copy_and_resolve_references()
        with sample.unlocked():
            sample.cfg = cfg
        return sample
