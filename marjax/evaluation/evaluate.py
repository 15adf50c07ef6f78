"""`marjax evaluate` as a function: samples images, measures them and records both.

Each setting has its own set of samples (see `evaluation.samples`). Once the set is measured, `evaluation.json` gets one
entry, and the set is deleted unless `save` keeps it. A second start skips settings with an entry and resumes the rest.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from marjax import config as config_lib
from marjax import distributed, numerics, progress
from marjax.errors import UserError, closest
from marjax.evaluation.across_processes import Processes, all_processes
from marjax.evaluation.missing import check_there
from marjax.evaluation.networks.extractor import FeatureExtractor, identity
from marjax.evaluation.networks.open_extractor import open_extractor
from marjax.evaluation.record import RECORD, SETTINGS, Record
from marjax.evaluation.samples import SampleSet, SampleSpec
from marjax.evaluation.score import Features, check_fits, score
from marjax.evaluation.statistics import DatasetStatistics, compute_statistics, read_statistics, write_statistics
from marjax.files import make_folder
from marjax.generation.sample import Opened, open_sampler
from marjax.generation.sampler import Sampler
from marjax.lock import locked_folder
from marjax.paths import optional, takes_paths
from marjax.ranges import check_arguments, shown
from marjax.workdir import read_workdir

LOCK = "evaluation.lock"  # not the lock of training, whose checkpoints may be evaluated meanwhile
FOLDER = "evaluation"  # of samples, in the work directory or `out`
_OLDER = {"reference": "statistics"}  # older names of arguments, for one release
_PATHS = ("extractor_path", "statistics", "tokenizer_path", "out")  # in a request
SAVES = ("", "npz", "png")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate and how.

    Attributes:
      num_images: images per setting, equally many of each class.
      seed: of all randomness, in [0, 2^32).
      weights: "ema", "raw" or a list of both; by default EMA weights if there are any.
      step: of the checkpoint; the newest by default.
      settings: lists of values for fields in SETTINGS; all combinations are measured. The run's own by default.
      batch_size: images per batch on one process's devices; `config.sample.batch_size` by default.
      extractor, extractor_path, statistics: override `config.eval`.
      tokenizer_path: the tokenizer's weights, if they have moved since training.
      save: "npz" or "png" keeps the samples: as one file for the ADM evaluator, or as a folder of pictures.
      out: the folder of record and samples; the work directory by default.
      overwrite: measure settings again that have an entry.
      progress: whether to show progress.
    """

    num_images: int = 50_000
    seed: int = 0
    weights: str | Sequence[str | None] | None = (None,)
    step: int | None = None
    settings: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    batch_size: int | None = None
    extractor: str | None = None
    extractor_path: str | None = None
    statistics: str | None = None
    tokenizer_path: str | None = None
    save: str = ""
    out: str | os.PathLike[str] | None = None
    overwrite: bool = False
    progress: bool = True


@numerics.pinned()
@takes_paths("workdir")
def evaluate(workdir: str | os.PathLike[str], request: Request = Request(), **given: Any) -> list[dict[str, Any]]:
    """Measures the weights of a work directory; every process calls this, with folders that all of them see.

    `marjax.evaluate(workdir, num_images=10_000, statistics="stats.npz", cfg=[1.0, 2.0])` measures two settings.

    Args:
      workdir: of a training run.
      request: what to measure; by default 50,000 images of the newest weights with the run's own settings.
      **given: fields of `Request`, and values or lists of values for these fields of `config.sample`: `num_iter`,
        `num_sampling_steps`, `cfg`, `cfg_schedule`, `temperature`, `confidence_order`, `choice_temperature`.

    Returns:
      The entries of the settings in `evaluation.json` (see docs/evaluation.md), in order.

    Raises:
      UserError: invalid input, raised before sampling.
    """
    request = _with_fields(request, given)
    paths: dict[str, Any] = {name: optional(getattr(request, name), name) for name in _PATHS}
    request = dataclasses.replace(request, **paths)
    config = read_workdir(workdir)
    if request.tokenizer_path is not None:
        config = config_lib.apply_overrides(config, {"tokenizer.path": request.tokenizer_path})
    combinations = _combinations(config, request)
    extractor, statistics = _open_measure(config, request, os.fspath(workdir))
    out = make_folder(workdir if request.out is None else request.out)
    with distributed.first_holds(locked_folder(out, "marjax evaluate", LOCK)), contextlib.ExitStack() as closing:
        record, processes = Record(out / RECORD), all_processes()
        statistics = _completed(statistics, extractor, out / FOLDER, processes)
        evaluation = _Evaluation(out, extractor, statistics, request.save, processes)
        entries = []
        weights_of_all = request.weights or ()
        total = len(weights_of_all) * len(combinations)
        bar = closing.enter_context(progress.bar("evaluating", total, "settings", show=request.progress))
        for weights in weights_of_all:
            opened = open_sampler(
                workdir, weights=weights, step=request.step, tokenizer_path=request.tokenizer_path, local=True
            )
            samplers: dict[Any, Sampler] = {}
            for sample in combinations:
                spec = _spec(config, sample, opened, request)
                key = {
                    **spec.identity,
                    "extractor": extractor.checksum,
                    "reference": statistics.checksum,  # the name under which records identify entries
                }
                entry = None if request.overwrite else record.find(key)
                if entry is None or (request.save and not evaluation.saved(spec).exists()):
                    sampler = opened.sampler.with_settings(sample)
                    sampler = samplers.setdefault(sampler.settings.shape(), sampler).with_settings(sample)
                    size, channels = config.data.image_size, config.data.channels
                    entry = evaluation.measure(spec, sampler, opened.params, (size, size, channels))
                    record.put(key, entry, write=processes.index == 0)
                    processes.barrier()
                if processes.index == 0:  # after the entry; a killed run may have left samples too
                    (out / FOLDER / spec.name).rmtree(missing_ok=True)
                entries.append(entry)
                bar.update()
    return entries


def _with_fields(request: Request, given: Mapping[str, Any]) -> Request:
    """Sets fields of the request or of its settings. Raises UserError: an unknown field."""
    fields = [field.name for field in dataclasses.fields(Request)]
    settings = {
        name: [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
        for name, value in given.items()
        if name in SETTINGS
    }
    given = {_OLDER.get(name, name): value for name, value in given.items() if name not in SETTINGS}
    if unknown := sorted(set(given) - set(fields)):
        raise UserError(
            f"evaluate has no argument {shown(unknown[0])}{closest(unknown[0], [*fields, *SETTINGS])}; use one of "
            f"{', '.join([*fields, *SETTINGS])}"
        )
    request = dataclasses.replace(request, **given)
    weights = request.weights
    return dataclasses.replace(
        request,
        settings={**request.settings, **settings} if settings else request.settings,
        weights=(weights,) if isinstance(weights, str) or weights is None else weights,
    )


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Formats entries as a Markdown table: the settings that differ, all metrics, the time."""
    names = [
        name
        for name in dict.fromkeys(name for entry in entries for name in entry["settings"])
        if name in ("weights", "num_images") or len({str(entry["settings"].get(name)) for entry in entries}) > 1
    ]
    metrics = list(dict.fromkeys(name for entry in entries for name in entry["metrics"]))
    lines = ["| " + " | ".join([*names, *metrics, "s/image"]) + " |", "|" + "---|" * (len(names) + len(metrics) + 1)]
    for entry in entries:
        cells = [str(entry["settings"].get(name, "")) for name in names]
        cells += ["" if (value := entry["metrics"].get(name)) is None else f"{value:.5g}" for name in metrics]
        seconds = entry["seconds_per_image"]
        lines.append("| " + " | ".join([*cells, "" if seconds is None else f"{seconds:.4g}"]) + " |")
    return "\n".join(lines)


def _combinations(config: ml_collections.ConfigDict, request: Request) -> list[ml_collections.ConfigDict]:
    """A resolved `config.sample` for each combination of settings. Raises UserError."""
    if unknown := sorted(set(request.settings) - set(SETTINGS)):
        raise UserError(f"settings has no field {unknown[0]}; use {', '.join(SETTINGS)}")
    if request.save not in SAVES:
        raise UserError(f"save={request.save!r} is unknown; use npz or png")
    if wrong := [each for each in request.weights or () if each not in (None, "ema", "raw")]:
        raise UserError(f"weights={wrong[0]!r} is unknown; use 'ema' or 'raw'")
    check_arguments(seed=request.seed, step=request.step, num_images=request.num_images, batch_size=request.batch_size)
    if request.num_images < 2:
        raise UserError(f"num_images={request.num_images} is too few; use at least 2")
    names = list(request.settings)
    for name in names:
        if isinstance(request.settings[name], str) or not isinstance(request.settings[name], Iterable):
            raise UserError(f"settings: {name}={shown(request.settings[name])} is not a list of values")
    found = []
    for values in itertools.product(*request.settings.values()):
        given = {f"sample.{name}": str(value) for name, value in zip(names, values, strict=True)}
        found.append(config_lib.resolve(config_lib.apply_overrides(config, given)).sample)
    return found


def _spec(
    config: ml_collections.ConfigDict, sample: ml_collections.ConfigDict, opened: Opened, request: Request
) -> SampleSpec:
    settings = {name: sample[name] for name in SETTINGS} | {"dtype": config.model.dtype}
    if sample.cfg == 1.0:  # without guidance the schedule has no effect
        settings["cfg_schedule"] = "linear"
    if not sample.confidence_order:
        del settings["choice_temperature"]
    return SampleSpec(
        num_images=request.num_images,
        seed=request.seed,
        num_classes=config.data.num_classes,
        settings=settings,
        weights=opened.weights,
        step=opened.step,
        digest=opened.digest,
        tokenizer=opened.sampler.tokenizer.checksum,
        batch_size=opened.sampler.fitting(request.batch_size or sample.batch_size),
    )


def _open_measure(
    config: ml_collections.ConfigDict, request: Request, workdir: str
) -> tuple[FeatureExtractor, DatasetStatistics]:
    """The extractor and the dataset statistics, checked to fit each other and the images. Raises UserError."""
    name = request.extractor or config.eval.extractor
    path = request.extractor_path
    if path is None:
        path = config.eval.extractor_path if name == config.eval.extractor else ""
    statistics_path = request.statistics or config.eval.statistics
    check_there(
        config,
        [f"{workdir}/config.json"],
        extractor=name,
        extractor_path=path,
        statistics=statistics_path,
        default=workdir,
    )
    extractor, statistics = open_extractor(name, path), read_statistics(statistics_path)
    check_fits(extractor, statistics, config.data.image_size, config.data.channels)
    return extractor, statistics


def _completed(
    given: DatasetStatistics, extractor: FeatureExtractor, folder: epath.Path, processes: Processes
) -> DatasetStatistics:
    """Computes what the statistics of a batch of images lack, and keeps it in `folder`. Raises UserError."""
    if given.images is None or (given.gaussian is not None and given.features is not None):
        return given
    kept = folder / f"statistics-{given.checksum[:12]}-{extractor.checksum[:12]}.npz"
    if not kept.exists():
        try:
            made = compute_statistics(
                given.images.batches(64, processes),
                len(given.images),
                extractor,
                processes=processes,
                source=given.source or given.path,
            )
        except ValueError as error:
            raise UserError(
                f"{extractor.name} does not take the images of {given.path} ({error}); give another --statistics"
            ) from None
        if processes.index == 0:
            make_folder(folder)
            write_statistics(kept, made)
        processes.barrier()
    made = read_statistics(kept)
    return dataclasses.replace(
        given, gaussian=given.gaussian or made.gaussian, spatial=given.spatial or made.spatial, features=made.features
    )


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """What all settings share: the folder of record and samples, extractor, statistics, `Request.save`, processes."""

    out: epath.Path
    extractor: FeatureExtractor
    statistics: DatasetStatistics
    save: str
    processes: Processes

    def saved(self, spec: SampleSpec) -> epath.Path:
        """Where samples are kept."""
        return self.out / FOLDER / (f"{spec.name}.npz" if self.save == "npz" else f"{spec.name}-png")

    def measure(
        self, spec: SampleSpec, sampler: Sampler, params: Any, image_shape: tuple[int, int, int]
    ) -> dict[str, Any]:
        """Samples and measures one setting; returns its entry."""
        processes, first = self.processes, self.processes.index == 0
        if not first:
            processes.barrier()  # until the first process has created the folder
        samples = SampleSet(self.out / FOLDER, spec, processes, image_shape=image_shape)
        if first:
            processes.barrier()
        samples.generate(sampler, params)
        features = Features(samples.folder)
        if first:
            features.clear()  # left by a killed run, perhaps with another number of processes
        processes.barrier()  # all batches are written
        metrics = score(
            samples.batches(),
            spec.num_images,
            self.extractor,
            self.statistics,
            processes,
            num_classes=spec.num_classes,
            features=features,
        )
        seconds = samples.seconds_per_image()
        saved = self.saved(spec)
        partial = saved.with_name(f"{saved.name}.partial")
        if self.save == "png":
            samples.write_pngs(partial)
        elif self.save and first:
            samples.write_npz(saved)
        processes.barrier()  # all pictures are written
        if self.save == "png" and first:
            saved.rmtree(missing_ok=True)
            partial.rename(saved)
        return {
            "settings": {
                **spec.settings,
                "weights": spec.weights,
                "step": spec.step,
                "num_images": spec.num_images,
                "seed": spec.seed,
            },
            "metrics": metrics,
            "seconds_per_image": seconds,
            "batch_size": samples.spec.batch_size,
            "samples": os.fspath(saved.relative_to(self.out)) if self.save else None,
            "extractor": identity(self.extractor),
            "statistics": {"name": self.statistics.name, "checksum": self.statistics.checksum},
            "weights_checksum": spec.digest,
            "tokenizer_checksum": spec.tokenizer,
            "machine": _machine(processes),
        }


def _machine(processes: Processes) -> dict[str, Any]:
    """The hardware and versions, which can explain different numbers."""
    versions = {name: importlib.metadata.version(name) for name in ("marjax", "jax", "jaxlib", "flax", "numpy")}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "hosts": processes.count,
        "python": platform.python_version(),
        **versions,
    }
