"""Reads `metrics.jsonl`: the metrics of a run, one JSON object per line."""

import math
import os
import sys
from typing import Any, NamedTuple

from marjax.errors import UserError
from marjax.files import read_whole
from marjax.json_file import parse_json

METRICS = "metrics.jsonl"
_MAX_BYTES = 512 << 20
_MAX_LINE = 1 << 20
_MAX_STEP = 1 << 53


class MetricLines(NamedTuple):
    """The lines of a file.

    Attributes:
      lines: {"step": int, name: float or str, ...}, sorted by step; numbers are finite.
      foreign: all other lines, unchanged.
    """

    lines: list[dict[str, Any]]
    foreign: list[bytes]


def read_metrics(path: str | os.PathLike[str], *, warn: bool = True) -> MetricLines:
    """Reads the metrics, keeping values that are numbers or text.

    A last line that a crash cut short is in neither list.

    Args:
      path: the file, local or gs://; a missing file has no lines.
      warn: whether to report foreign lines on standard error.

    Raises:
      UserError: the file cannot be read or is too large.
      StorageError: gs:// does not answer.
    """
    try:
        data = read_whole(path, _MAX_BYTES, advice="move it away")
    except (FileNotFoundError, NotADirectoryError):
        return MetricLines([], [])
    found = MetricLines([], [])
    first = 0
    rows = data.splitlines()
    for number, row in enumerate(rows, 1):
        line = _parse(row)
        if line is not None:
            found.lines.append(line)
        elif row.strip() and (number < len(rows) or data.endswith((b"\n", b"\r"))):
            found.foreign.append(row)
            first = first or number
    if found.foreign and warn:
        print(
            f"{os.fspath(path)}: ignored {len(found.foreign)} of {len(rows)} lines without metrics, first line {first}",
            file=sys.stderr,
        )
    found.lines.sort(key=lambda line: line["step"])
    return found


def _parse(row: bytes) -> dict[str, Any] | None:
    if len(row) > _MAX_LINE:
        return None
    try:
        line = parse_json(row, {"step": float}, where="line", advice="", allow_nan=True)
    except UserError:
        return None
    step = line["step"]
    if not 0 <= step < _MAX_STEP or int(step) != step:
        return None
    values = {
        name: value
        for name, value in line.items()
        if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))
    }
    return {**values, "step": int(step)}
