"""What a sweep is: the points of a sweep file, their names, and the file itself."""

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

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,199}")
LOCK = "sweep.lock"  # of the root folder
_TAKEN = ("logs", "jobs", LOCK, "table.csv", "table.md")  # in the root folder, beside the points


@dataclasses.dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
      name: of its folder; `name_of` makes one of an overlay.
      config: as `--config` takes it.
      overlay: single fields, as `--config.key` sets them.
    """

    name: str
    config: str
    overlay: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file returns.

    Attributes:
      points: at least one; their names are folder names and differ in more than case.
      measure: `measure(workdir, root)` once a point is trained, in its process: the point's lines of the table, each a
        dict of column to int, float or str. Without it a point has one line, of its training.
      prepare: `prepare(root)` before the first point, in a process of its own, whenever there is a point to run; so it
        should keep what it has made, such as a classifier in the root folder.
      report: `report(root, rows)` after the last, in the process of the sweep; of rows whose "status" is not "done"
        the measured columns are missing.

    Raises:
      UserError: no points, or names that cannot be used.
    """

    points: Sequence[Point]
    measure: Callable[[epath.Path, epath.Path], list[dict[str, Any]]] | None = None
    prepare: Callable[[epath.Path], None] | None = None
    report: Callable[[epath.Path, list[dict[str, Any]]], None] | None = None

    def __post_init__(self) -> None:
        if not self.points:
            raise UserError("a sweep has no points: give at least one")
        for name in (point.name for point in self.points):
            if not _NAME.fullmatch(name) or name.lower() in _TAKEN:
                raise UserError(
                    f"a sweep's point is named {name!r}: give letters, digits and _.,=+- (at most 200, a "
                    f"letter or digit first, not {', '.join(_TAKEN)})"
                )
        counts = Counter(point.name.lower() for point in self.points)
        twice = [point.name for point in self.points if counts[point.name.lower()] > 1]
        if twice:
            raise UserError(f"a sweep has several points named {twice[0]!r}: give each its own name")


def name_of(overlay: Mapping[str, Any]) -> str:
    """A folder's name for an overlay, the same on every start: "lr=0.001,seed=0", or "base" of an empty one.

    A field goes by the last part of its key, or by all of it where two fields share that. What a folder cannot be
    called by becomes -, and a hash of the overlay follows; so too where the name would be too long.
    """
    if not overlay:
        return "base"
    name = _joined(overlay)
    if _NAME.fullmatch(name):
        return name
    digest = hashlib.sha256(json.dumps(dict(overlay), sort_keys=True, default=repr).encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", name).lstrip("_.,=+-")[:150] + f"-{digest}"


def _joined(overlay: Mapping[str, Any]) -> str:
    leaves = Counter(key.rsplit(".", 1)[-1] for key in overlay)
    short = {key: key if leaves[key.rsplit(".", 1)[-1]] > 1 else key.rsplit(".", 1)[-1] for key in overlay}
    return ",".join(f"{short[key]}={value}" for key, value in overlay.items())


def grid(axes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Every combination of the values, the last axis running fastest, as overlays by name.

    `grid({"train.lr": [1e-3], "seed": [0, 1]})` has the keys "lr=0.001,seed=0" and "lr=0.001,seed=1"; see `name_of`.

    Raises:
      UserError: a value that cannot be part of a folder's name, or one that is there twice.
    """
    overlays: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()):
        overlay = dict(zip(axes, values, strict=True))
        name = _joined(overlay)
        if not _NAME.fullmatch(name):
            raise UserError(
                f"grid: {name!r} cannot name a folder (letters, digits and _.,=+-, at most 200): name "
                f"these points yourself"
            )
        if name in overlays:
            raise UserError(f"grid: {name!r} is there twice: give each value once")
        overlays[name] = overlay
    return overlays


def select(only: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of `names` that are asked for, in their order; a string has commas between names, and maybe in them.

    Raises:
      UserError: none, or an unknown name.
    """
    pieces, wanted = only.split(",") if isinstance(only, str) else list(only), set()
    while pieces:
        for count in range(len(pieces), 0, -1):  # the longest first: names of `grid` have commas
            name = ",".join(pieces[:count])
            if name in names:
                wanted.add(name)
                pieces = pieces[count:]
                break
        else:
            known = closest(pieces[0], names) or f"; there are: {' '.join(names)}"
            raise UserError(f"the sweep has no point {pieces[0]!r}{known}")
    if not wanted:
        raise UserError("no points asked for: give at least one name")
    return [name for name in names if name in wanted]


@takes_paths("path")
def load(path: str | os.PathLike[str]) -> Sweep:
    """The sweep of a file: what its `get_sweep` returns, or the points that it yields.

    A `get_sweep` that yields may give a `Point`, an overlay, or a name and an overlay; the last two are of the config
    that the file's `CONFIG` names. `measure`, `prepare` and `report` are then the functions of these names in the file.

    Raises:
      UserError: no such file, one without `get_sweep`, or points that cannot be used.
    """
    function = load_function(os.fspath(path), "sweep", "get_sweep")
    with errors_of(os.fspath(path), "sweep"):
        loaded = function()
    if isinstance(loaded, Sweep):
        return loaded
    if isinstance(loaded, str | Mapping) or not isinstance(loaded, Iterable):
        raise UserError(
            f"get_sweep of {path!r} returned {type(loaded).__name__}, not a Sweep: return one, or yield overlays"
        )
    names = getattr(function, "__globals__", {})
    with errors_of(os.fspath(path), "sweep"):
        points = [_point(each, names.get("CONFIG"), path) for each in loaded]
    return Sweep(points, **{name: names.get(name) for name in ("measure", "prepare", "report")})


def _point(given: Any, config: Any, path: Any) -> Point:
    name, overlay = given if isinstance(given, tuple) and len(given) == 2 else ("", given)
    if isinstance(given, Point):
        return given
    if not isinstance(name, str) or not isinstance(overlay, Mapping):
        raise UserError(
            f"get_sweep of {path!r} yielded {given!r:.100}: yield a Point, an overlay (a dict of config "
            f"fields), or a name and an overlay"
        )
    if not isinstance(config, str):
        raise UserError(f"{path!r} yields overlays, but does not say of which config: set CONFIG = 'NAME:ARG' in it")
    return Point(name or name_of(overlay), config, overlay)
