"""The table of a sweep: rows as dicts, written as CSV for scripts and as Markdown for people."""

import csv
import io
from collections.abc import Sequence

from etils import epath

from marjax.files import write_bytes
from marjax.metrics_file import METRICS, read_metrics
from marjax.sweep.definition import Row

# Columns of every row, around the measured ones; a row omits what its point does not have yet.
_FIRST, _LAST = ("point", "config"), ("status", "seconds", "error")
_TRAINING = ("step", "train/loss")
FIXED_COLUMNS = (*_FIRST, *_TRAINING, *_LAST)


def last_metrics(workdir: epath.Path) -> Row:
    """Returns "step" and "train/loss" of the last line of `metrics.jsonl`, if present. Raises UserError."""
    lines = read_metrics(workdir / METRICS).lines
    return {key: lines[-1][key] for key in _TRAINING if lines and key in lines[-1]}


def columns(rows: Sequence[Row], varying: Sequence[str]) -> list[str]:
    """Returns the columns present: point, `varying` fields, training, measured in order of appearance, status."""
    present = dict.fromkeys(key for row in rows for key in row)
    front = ["point", *varying, *_TRAINING]
    measured = [key for key in present if key not in front and key not in _LAST]
    return [key for key in [*front, *measured, *_LAST] if key in present]


def to_csv(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Numbers in full precision; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Floats with 4 significant digits, numbers right-aligned; missing values are empty."""

    def cell(value: object) -> str:
        text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        return " ".join(text.split()).replace("|", "\\|")

    numeric = [all(isinstance(row.get(name, 0), int | float) for row in rows) for name in names]
    lines = [
        [cell(name) for name in names],
        ["---:" if right else "---" for right in numeric],
        *([cell(row.get(name)) for name in names] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_table(root: epath.Path, rows: Sequence[Row], varying: Sequence[str]) -> None:
    """Writes `table.csv` and `table.md`. Raises UserError."""
    names = columns(rows, varying)
    write_text(root / "table.csv", to_csv(rows, names))
    write_text(root / "table.md", to_markdown(rows, names))


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file atomically. Raises UserError."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))
