"""Reads the data for figures from work directories: metrics, pictures of samples, evaluation results."""

import dataclasses
import math
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from marjax.errors import UserError
from marjax.evaluation.metrics import names
from marjax.evaluation.record import RECORD, read_record
from marjax.json_file import read_json
from marjax.metrics_file import METRICS, read_metrics
from marjax.plots.curves import Result

SAMPLES = "samples"
NUM_IMAGES, GUIDED = "eval/num_images", "_guided"  # in metrics of evaluations
_EVAL = "eval/"
_PICTURE = re.compile(r"raw_and_ema_(\d+)\.png")


@dataclasses.dataclass(frozen=True)
class Run:
    """A work directory.

    Attributes:
      name: the shortest unique end of its path.
      lines: of its metrics, sorted by step.
      pictures: files of samples by step, in order; raw weights left, EMA weights right.
      results: of `evaluation.json`; the settings include work directory, statistics and extractor.
    """

    name: str
    lines: Sequence[dict[str, Any]] = ()
    pictures: dict[int, epath.Path] = dataclasses.field(default_factory=dict)
    results: Sequence[Result] = ()

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, int64 (N,), and finite values, float64 (N,), of a metric; N may be 0."""
        points = [(line["step"], line[metric]) for line in self.lines if _is_finite(line.get(metric))]
        return np.array([step for step, _ in points], np.int64), np.array([value for _, value in points], np.float64)


def read_runs(workdirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Reads distinct work directories; reports missing files on standard error.

    Raises:
      UserError: no directory, one that does not exist or has nothing to draw, or an unreadable file.
    """
    paths = list(dict.fromkeys(epath.Path(workdir) for workdir in workdirs))
    if not paths:
        raise UserError("no work directory; give at least one")
    return [_read_run(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]


def distinct_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The shortest unique ends of distinct paths: "run", or "a/run" and "b/run"."""
    whole = [os.fspath(path) for path in paths]
    parts = [pathlib.PurePosixPath(path if "://" in path else os.path.abspath(path)).parts for path in whole]
    names = []
    for mine in parts:
        same = [sum(other[-n:] == mine[-n:] for other in parts) for n in range(1, len(mine) + 1)]
        length = 1 + same.index(1) if 1 in same else len(mine)
        names.append(str(pathlib.PurePosixPath(*mine[-length:])))
    return names


def _suggestion(path: epath.Path) -> str:
    from marjax.workdir import suggestion  # imports JAX, which figures do not need

    return suggestion(path)


def _read_run(path: epath.Path, name: str) -> Run:
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give a work directory of marjax train{_suggestion(path)}")
    try:
        found = {file: (path / file).exists() for file in (METRICS, SAMPLES, RECORD)}
        if not any(found.values()):
            raise UserError(
                f"{path} has no {METRICS}, {SAMPLES} or {RECORD} to draw; give a work directory of marjax train"
                f"{_suggestion(path)}"
            )
        missing = [file for file, is_there in found.items() if not is_there]
        if missing:
            print(f"{path} has no {' and no '.join(missing)}; it is missing from those figures", file=sys.stderr)
        return Run(
            name,
            _read_lines(path) if found[METRICS] else (),
            _find_pictures(path / SAMPLES) if found[SAMPLES] else {},
            _read_results(path / RECORD, name) if found[RECORD] else (),
        )
    except OSError as error:
        raise UserError(f"work directory {path} cannot be read ({error.strerror or error})") from None


def _read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The metrics; evaluations of older runs get the names and number of images that their config implies."""
    lines = read_metrics(path / METRICS).lines
    old = [line for line in lines if NUM_IMAGES not in line and any(name.startswith(_EVAL) for name in line)]
    if not old:
        return lines
    try:
        section = read_json(path / "config.json", {"eval": {str: object}}, advice="", missing={"eval": {}})["eval"]
    except UserError:
        section = {}
    extractor, count = section.get("extractor"), section.get("num_images")
    for line in old:
        if isinstance(extractor, str):
            measured = {name.removeprefix(_EVAL): line.pop(name) for name in list(line) if name.startswith(_EVAL)}
            plain = {name: value for name, value in measured.items() if not name.endswith(GUIDED)}
            guided = {name.removesuffix(GUIDED): value for name, value in measured.items() if name.endswith(GUIDED)}
            line |= {f"{_EVAL}{name}": value for name, value in names.of_extractor(plain, extractor).items()}
            line |= {f"{_EVAL}{name}{GUIDED}": value for name, value in names.of_extractor(guided, extractor).items()}
        if _is_finite(count):
            line[NUM_IMAGES] = count
    return lines


def _find_pictures(folder: epath.Path) -> dict[int, epath.Path]:
    found = [(_PICTURE.fullmatch(path.name), path) for path in folder.iterdir()]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def _read_results(path: epath.Path, name: str) -> list[Result]:
    # Distances also depend on these; two checksums of one name are two statistics.
    return [
        Result(
            {
                "workdir": name,
                **result["settings"],
                **{
                    kind: f"{result[kind]['name']} ({result[kind]['checksum'][:8]})"
                    for kind in ("statistics", "extractor")
                },
            },
            {
                metric: float(value)
                for metric, value in {**result["metrics"], "seconds_per_image": result["seconds_per_image"]}.items()
                if _is_finite(value)
            },
        )
        for result in read_record(path)
    ]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
