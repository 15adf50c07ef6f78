"""The definition of a sweep: its points, their names, and the sweep file."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from marjax.config import errors_of, load_function
from marjax.errors import UserError, closest
from marjax.paths import takes_paths

Row = dict[str, Any]  # of the table

LOCK = "sweep.lock"  # in the root folder
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,199}")
_RESERVED = ("logs", "jobs", LOCK, "table.csv", "table.md")  # in the root folder, beside the points


@dataclasses.dataclass(frozen=True)
class Point:
    """One training run.

    Attributes:
      name: name of its work directory; `name_of` derives one from an overlay.
      config: value of `--config`.
      overlay: config fields to set, as `--config.key` does.
    """

    name: str
    config: str
    overlay: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The return value of `get_sweep`.

    Attributes:
      points: at least one; their names are folder names, unique when case is ignored.
      measure: `measure(workdir, root)` runs in the point's process after training and returns the point's rows of the
        table, each a dict from column to int, float or str. Without it a point has one row, with its training metrics.
      prepare: `prepare(root)` runs in its own process before the first point, whenever a point has to run; it should
        keep its results, such as a classifier, in the root folder.
      report: `report(root, rows)` runs after the last point, in the process of the sweep. Rows whose "status" is not
        "done" lack the measured columns.

    Raises:
      UserError: no points, or invalid or repeated names.
    """

    points: Sequence[Point]
    measure: Callable[[epath.Path, epath.Path], list[Row]] | None = None
    prepare: Callable[[epath.Path], None] | None = None
    report: Callable[[epath.Path, list[Row]], None] | None = None

    def __post_init__(self) -> None:
        if not self.points:
            raise UserError("sweep has no points; give at least one")
        counts = Counter(point.name.lower() for point in self.points)
        for name in (point.name for point in self.points):
            if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
                raise UserError(
                    f"invalid point name {name!r}; use at most 200 letters, digits and _.,=+-, starting with a letter "
                    f"or digit, and none of {', '.join(_RESERVED)}"
                )
            if counts[name.lower()] > 1:
                raise UserError(f"several points are named {name!r}; give each a unique name")


def name_of(overlay: Mapping[str, Any]) -> str:
    """Returns a deterministic folder name for an overlay, such as "lr=0.001,seed=0"; "base" for an empty one.

    A field is named by the last part of its key, or by the full key if two fields share the last part. In names that
    are too long or invalid for a folder, invalid characters become - and a hash of the overlay is appended.
    """
    if not overlay:
        return "base"
    name = _joined(overlay)
    if _NAME.fullmatch(name):
        return name
    digest = hashlib.sha256(json.dumps(dict(overlay), sort_keys=True, default=repr).encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", name).lstrip("_.,=+-")[:150] + f"-{digest}"


def _joined(overlay: Mapping[str, Any]) -> str:
    last = {key: key.rsplit(".", 1)[-1] for key in overlay}
    counts = Counter(last.values())
    return ",".join(f"{key if counts[last[key]] > 1 else last[key]}={value}" for key, value in overlay.items())


def grid(axes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Returns an overlay for every combination of the values, by name; the last axis varies fastest.

    `grid({"train.lr": [1e-3], "seed": [0, 1]})` has the keys "lr=0.001,seed=0" and "lr=0.001,seed=1"; see `name_of`.

    Raises:
      UserError: a repeated value, or one that a folder name cannot contain.
    """
    overlays: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()):
        overlay = dict(zip(axes, values, strict=True))
        name = _joined(overlay)
        if not _NAME.fullmatch(name):
            raise UserError(
                f"grid: {name!r} is no valid folder name (at most 200 letters, digits and _.,=+-); name these points "
                f"yourself"
            )
        if name in overlays:
            raise UserError(f"grid: {name!r} is repeated; give each value once")
        overlays[name] = overlay
    return overlays


def select(only: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the requested `names` in their order; in a string they are separated by commas, and may contain commas.

    Raises:
      UserError: no names, or an unknown one.
    """
    pieces, wanted = only.split(",") if isinstance(only, str) else list(only), set()
    while pieces:
        for count in range(len(pieces), 0, -1):  # longest first: names from `grid` contain commas
            name = ",".join(pieces[:count])
            if name in names:
                wanted.add(name)
                pieces = pieces[count:]
                break
        else:
            known = closest(pieces[0], names) or f"; the points are: {' '.join(names)}"
            raise UserError(f"sweep has no point {pieces[0]!r}{known}")
    if not wanted:
        raise UserError("no points requested; give at least one name")
    return [name for name in names if name in wanted]


@takes_paths("path")
def load(path: str | os.PathLike[str]) -> Sweep:
    """Loads a sweep file: returns what its `get_sweep` returns, or a Sweep of the points that it yields.

    A generator `get_sweep` yields a `Point`, an overlay, or a pair of name and overlay; overlays apply to the config
    named by the file's `CONFIG`. The file's functions `measure`, `prepare` and `report` are used if present.

    Raises:
      UserError: no such file, no `get_sweep` in it, or invalid points.
    """
    function = load_function(os.fspath(path), "sweep", "get_sweep")
    with errors_of(os.fspath(path), "sweep"):
        loaded = function()
    if isinstance(loaded, Sweep):
        return loaded
    if isinstance(loaded, str | Mapping) or not isinstance(loaded, Iterable):
        raise UserError(f"get_sweep in {path!r} returned {type(loaded).__name__}; return a Sweep or yield overlays")
    names = getattr(function, "__globals__", {})
    with errors_of(os.fspath(path), "sweep"):
        points = [_point(each, names.get("CONFIG"), path) for each in loaded]
    return Sweep(points, **{name: names.get(name) for name in ("measure", "prepare", "report")})


def _point(given: object, config: object, path: str | os.PathLike[str]) -> Point:
    if isinstance(given, Point):
        return given
    name, overlay = given if isinstance(given, tuple) and len(given) == 2 else ("", given)
    if not isinstance(name, str) or not isinstance(overlay, Mapping):
        raise UserError(
            f"get_sweep in {path!r} yielded {given!r:.100}; yield a Point, an overlay (a dict of config fields), or a "
            f"pair of name and overlay"
        )
    if not isinstance(config, str):
        raise UserError(f"{path!r} yields overlays but names no config; set CONFIG = 'NAME:ARG' in it")
    return Point(name or name_of(overlay), config, overlay)
