"""What a sweep is: the points of a sweep file, their names, and the file itself."""

import dataclasses
import difflib
import itertools
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from marjax.config import load_function
from marjax.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,199}")
_TAKEN = ("logs", "sweep.lock", "table.csv", "table.md")  # in the root folder, beside the points


@dataclasses.dataclass(frozen=True)
class Point:
    """One training: a folder name, a config as `--config` takes it, and single fields as `--config.key` sets them."""

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
    measure: Callable[[pathlib.Path, pathlib.Path], list[dict[str, Any]]] | None = None
    prepare: Callable[[pathlib.Path], None] | None = None
    report: Callable[[pathlib.Path, list[dict[str, Any]]], None] | None = None

    def __post_init__(self) -> None:
        if not self.points:
            raise UserError("a sweep has no points: give at least one")
        for name in (point.name for point in self.points):
            if not _NAME.fullmatch(name) or name.lower() in _TAKEN:
                raise UserError(f"a sweep's point is named {name!r}: give letters, digits and _.,=+- (at most 200, a "
                                f"letter or digit first, not {', '.join(_TAKEN)})")
        counts = Counter(point.name.lower() for point in self.points)
        twice = [point.name for point in self.points if counts[point.name.lower()] > 1]
        if twice:
            raise UserError(f"a sweep has several points named {twice[0]!r}: give each its own name")


def grid(axes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Every combination of the values, the last axis running fastest, as overlays by name.

    `grid({"train.lr": [1e-3], "seed": [0, 1]})` has the keys "lr=0.001,seed=0" and "lr=0.001,seed=1". A field goes by
    the last part of its key, or by all of it where two axes share that.

    Raises:
      UserError: a value that cannot be part of a folder's name, or one that is there twice.
    """
    leaves = Counter(key.rsplit(".", 1)[-1] for key in axes)
    short = {key: key if leaves[key.rsplit(".", 1)[-1]] > 1 else key.rsplit(".", 1)[-1] for key in axes}
    overlays: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()):
        overlay = dict(zip(axes, values, strict=True))
        name = ",".join(f"{short[key]}={value}" for key, value in overlay.items())
        if not _NAME.fullmatch(name):
            raise UserError(f"grid: {name!r} cannot name a folder (letters, digits and _.,=+-, at most 200): name "
                            f"these points yourself")
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
            close = difflib.get_close_matches(pieces[0], names, 1, 0.5)
            raise UserError(f"the sweep has no point {pieces[0]!r}; "
                            + (f"the closest is {close[0]!r}" if close else f"there are: {' '.join(names)}"))
    if not wanted:
        raise UserError("no points asked for: give at least one name")
    return [name for name in names if name in wanted]


def load(path: str | os.PathLike[str]) -> Sweep:
    """The sweep of a file.

    Raises:
      UserError: no such file, one without `get_sweep`, or points whose names cannot be used.
    """
    loaded = load_function(os.fspath(path), "sweep", "get_sweep")()
    if not isinstance(loaded, Sweep):
        raise UserError(f"get_sweep of {path!r} returned {type(loaded).__name__}, not a Sweep")
    return loaded
