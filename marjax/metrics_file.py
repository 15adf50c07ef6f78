"""`metrics.jsonl`: the metrics of a run, one JSON object a line, whatever else has been written to it."""

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
    """Of a file.

    Attributes:
      lines: by step, each {"step": int, name: float or str, ...}; numbers are finite.
      foreign: the other lines, as they are.
    """

    lines: list[dict[str, Any]]
    foreign: list[bytes]


def read_metrics(path: str | os.PathLike[str], *, warn: bool = True) -> MetricLines:
    """Reads the lines of metrics; a line that holds none is left out, and so is a value that is no number or text.

    A last line that a crash has cut short is in neither list.

    Args:
      path: of the file, local or gs://; one that does not exist has no lines.
      warn: print to standard error how many lines are foreign, and which is the first.

    Raises:
      UserError: the file cannot be read, or is far too long.
      StorageError: gs:// does not answer.
    """
    where = os.fspath(path)
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
            f"{where}: {len(found.foreign)} of {len(rows)} lines hold no metrics and are ignored, the first is line "
            f"{first}",
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
