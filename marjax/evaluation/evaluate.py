"""What `marjax evaluate` does, as a function: samples, metrics, and a record of both that can be trusted.

Every setting has a set of samples of its own, made as `evaluation.samples` says; once it is scored, one entry goes into
`evaluation.json` and the set is deleted, unless it is asked for. A second start skips what has its entry and goes on
where the first was ended.
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
from marjax.evaluation.networks.extractor import FeatureExtractor, open_extractor
from marjax.evaluation.record import RECORD, Record
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

LOCK = "evaluation.lock"  # another than a training's: its checkpoints may be evaluated meanwhile
FOLDER = "evaluation"  # of samples, in the work directory or `out`
# The fields of config.sample that alter an image.
FIELDS = (
    "num_iter",
    "num_sampling_steps",
    "cfg",
    "cfg_schedule",
    "temperature",
    "confidence_order",
    "choice_temperature",
)
_OLDER = {"reference": "statistics"}  # names of arguments, for one release
_PATHS = ("extractor_path", "statistics", "tokenizer_path", "out")  # of a request
SAVES = ("", "npz", "png")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate and how.

    Attributes:
      num_images: of every setting, equally many of each class.
      seed: of all randomness, in [0, 2^32).
      weights: "ema", "raw" or a list of both; the first that there is by default.
      step: of the checkpoint; the newest by default.
      settings: values to try of FIELDS, all combinations of them; the run's own by default.
      batch_size: images at a time on one host's devices; `config.sample.batch_size` by default.
      extractor, extractor_path, statistics: as in `config.eval`, which has the defaults.
      tokenizer_path: where the tokenizer's weights are now, if they have moved since the training.
      save: "npz" or "png" to keep the samples, as one file for the ADM evaluator or as a folder of pictures.
      out: where record and samples go; the work directory by default.
      overwrite: measure again what has its entry.
      progress: whether to show how far it is.
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
    """Measures a work directory's weights; every process of a run calls this, with folders that all of them see.

    `marjax.evaluate(workdir, num_images=10_000, statistics="stats.npz", cfg=[1.0, 2.0])` measures two settings.

    Args:
      workdir: of a training run.
      request: what to measure, by default 50,000 images of the newest weights with the run's own settings.
      **given: single fields of `Request`, and of `config.sample` a value or a list of values to try: `num_iter`,
        `num_sampling_steps`, `cfg`, `cfg_schedule`, `temperature`, `confidence_order`, `choice_temperature`.

    Returns:
      The entries of the settings asked for, in order, as they stand in `evaluation.json` (see docs/evaluation.md).

    Raises:
      UserError: anything that cannot be used; found before any sample is made.
    """
    request = _with_fields(request, given)
    paths: dict[str, Any] = {name: optional(getattr(request, name), name) for name in _PATHS}
    request = dataclasses.replace(request, **paths)
    processes = all_processes()
    config = read_workdir(workdir)
    if request.tokenizer_path is not None:
        config = config_lib.apply_overrides(config, {"tokenizer.path": request.tokenizer_path})
    combinations = _combinations(config, request)
    measure = _Measure.open(config, request, os.fspath(workdir))
    out = make_folder(workdir if request.out is None else request.out)
    with distributed.first_holds(locked_folder(out, "marjax evaluate", LOCK)), contextlib.ExitStack() as closing:
        record = Record(out / RECORD)
        measure = measure.with_features(out / FOLDER, processes)
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
                identity = {
                    **spec.identity,
                    "extractor": measure.extractor.checksum,
                    "reference": measure.statistics.checksum,  # an older name, which entries are found by
                }
                entry = None if request.overwrite else record.find(identity)
                if entry is None or (request.save and not _saved(out, spec, request.save).exists()):
                    sampler = opened.sampler.with_settings(sample)
                    sampler = samplers.setdefault(sampler.settings.shape(), sampler).with_settings(sample)
                    entry = _one(out, spec, sampler, opened.params, measure, request, processes)
                    record.put(identity, entry, write=processes.index == 0)
                    processes.barrier()
                if processes.index == 0:  # once the entry is there, and not before; a kill may have left them
                    (out / FOLDER / spec.name).rmtree(missing_ok=True)
                entries.append(entry)
                bar.update()
    return entries


def _with_fields(request: Request, given: Mapping[str, Any]) -> Request:
    """The request with single fields of it, or of its settings, set. Raises UserError: an unknown one."""
    fields = [field.name for field in dataclasses.fields(Request)]
    settings = {
        name: [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
        for name, value in given.items()
        if name in FIELDS
    }
    given = {_OLDER.get(name, name): value for name, value in given.items() if name not in FIELDS}
    if unknown := sorted(set(given) - set(fields)):
        raise UserError(
            f"evaluate takes no {shown(unknown[0])}{closest(unknown[0], [*fields, *FIELDS])}; there are "
            f"{', '.join([*fields, *FIELDS])}"
        )
    request = dataclasses.replace(request, **given)
    weights = request.weights
    return dataclasses.replace(
        request,
        settings={**request.settings, **settings} if settings else request.settings,
        weights=(weights,) if isinstance(weights, str) or weights is None else weights,
    )


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Entries as a Markdown table: the settings that differ between them, every metric, the time."""
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
    if unknown := sorted(set(request.settings) - set(FIELDS)):
        raise UserError(f"{unknown[0]} is no setting of a sample: give some of {', '.join(FIELDS)}")
    if request.save not in SAVES:
        raise UserError(f"save is {request.save!r}: give npz or png")
    if wrong := [each for each in request.weights or () if each not in (None, "ema", "raw")]:
        raise UserError(f"weights is {wrong[0]!r}: give 'ema' or 'raw'")
    check_arguments(seed=request.seed, step=request.step, num_images=request.num_images, batch_size=request.batch_size)
    if request.num_images < 2:
        raise UserError(f"num_images is {request.num_images}: give at least 2")
    names = list(request.settings)
    for name in names:
        if isinstance(request.settings[name], str) or not isinstance(request.settings[name], Iterable):
            raise UserError(f"settings: {name} is {shown(request.settings[name])}: give a list of values to try")
    found = []
    for values in itertools.product(*request.settings.values()):
        given = {f"sample.{name}": str(value) for name, value in zip(names, values, strict=True)}
        found.append(config_lib.resolve(config_lib.apply_overrides(config, given)).sample)
    return found


def _spec(
    config: ml_collections.ConfigDict, sample: ml_collections.ConfigDict, opened: Opened, request: Request
) -> SampleSpec:
    settings = {name: sample[name] for name in FIELDS} | {"dtype": config.model.dtype}
    if sample.cfg == 1.0:  # no guidance, whatever its schedule
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


def _one(
    out: epath.Path,
    spec: SampleSpec,
    sampler: Sampler,
    params: Any,
    measure: "_Measure",
    request: Request,
    processes: Processes,
) -> dict[str, Any]:
    """Samples and scores one setting."""
    if processes.index:
        processes.barrier()  # until the first host has made the folder
    samples = SampleSet(out / FOLDER, spec, processes.index, processes.count, image_shape=measure.image_shape)
    if not processes.index:
        processes.barrier()
    samples.generate(sampler, params)
    features = Features(samples.folder)
    if processes.index == 0:
        features.clear()  # what a killed run has left, perhaps of other hosts
    processes.barrier()  # all batches are there
    metrics = score(
        samples.batches(),
        spec.num_images,
        measure.extractor,
        measure.statistics,
        processes,
        num_classes=spec.num_classes,
        features=features,
    )
    seconds = samples.seconds_per_image()
    saved = _saved(out, spec, request.save)
    begun = saved.with_name(f"{saved.name}.partial")
    if request.save == "png":
        samples.write_pngs(begun)
    elif request.save and processes.index == 0:
        samples.write_npz(saved)
    processes.barrier()  # nobody reads the set any more
    if request.save == "png" and processes.index == 0:
        saved.rmtree(missing_ok=True)
        begun.rename(saved)
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
        "samples": os.fspath(_saved(out, spec, request.save).relative_to(out)) if request.save else None,
        **measure.identity,
        "weights_checksum": spec.digest,
        "tokenizer_checksum": spec.tokenizer,
        "machine": _machine(processes),
    }


def _saved(out: epath.Path, spec: SampleSpec, save: str) -> epath.Path:
    return out / FOLDER / (f"{spec.name}.npz" if save == "npz" else f"{spec.name}-png")


@dataclasses.dataclass(frozen=True)
class _Measure:
    """What samples, images (H, W, C), are measured with and against."""

    extractor: FeatureExtractor
    statistics: DatasetStatistics
    image_shape: tuple[int, int, int]

    @classmethod
    def open(cls, config: ml_collections.ConfigDict, request: Request, workdir: str) -> "_Measure":
        name = request.extractor or config.eval.extractor
        path = request.extractor_path
        if path is None:
            path = config.eval.extractor_path if name == config.eval.extractor else ""
        statistics = request.statistics or config.eval.statistics
        check_there(
            config,
            [f"{workdir}/config.json"],
            extractor=name,
            extractor_path=path,
            statistics=statistics,
            default=workdir,
        )
        size = config.data.image_size
        made = cls(open_extractor(name, path), read_statistics(statistics), (size, size, config.data.channels))
        check_fits(made.extractor, made.statistics, config.data.image_size, config.data.channels)
        return made

    def with_features(self, folder: epath.Path, processes: Processes) -> "_Measure":
        """With what the statistics of a batch of images lack, computed from these and kept in `folder`."""
        given = self.statistics
        if given.images is None or (given.gaussian is not None and given.features is not None):
            return self
        kept = folder / f"statistics-{given.checksum[:12]}-{self.extractor.checksum[:12]}.npz"
        if not kept.exists():
            try:
                made = compute_statistics(
                    given.images.batches(64, processes),
                    len(given.images),
                    self.extractor,
                    processes=processes,
                    source=given.source or given.path,
                )
            except ValueError as error:
                raise UserError(
                    f"the images of {given.path} cannot be seen by {self.extractor.name} ({error}): give "
                    f"another --statistics"
                ) from None
            if processes.index == 0:
                make_folder(folder)
                write_statistics(kept, made)
            processes.barrier()
        made = read_statistics(kept)
        return dataclasses.replace(
            self,
            statistics=dataclasses.replace(
                given,
                gaussian=given.gaussian or made.gaussian,
                spatial=given.spatial or made.spatial,
                features=made.features,
            ),
        )

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "extractor": {"name": self.extractor.name, "checksum": self.extractor.checksum},
            "statistics": {"name": self.statistics.name, "checksum": self.statistics.checksum},
        }


def _machine(processes: Processes) -> dict[str, Any]:
    """What it ran on and with, for whoever wonders why numbers differ."""
    versions = {name: importlib.metadata.version(name) for name in ("marjax", "jax", "jaxlib", "flax", "numpy")}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "hosts": processes.count,
        "python": platform.python_version(),
        **versions,
    }
