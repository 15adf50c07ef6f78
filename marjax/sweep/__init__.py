"""Sweeps: many trainings from one file, a process and a work directory each, resumable, and one table of them all.

A sweep file has `get_sweep() -> Sweep`. In the root folder of a sweep lie `NAME/` (the work directory of a point, with
`result.json` once it is finished), `logs/NAME.log`, `table.csv` and `table.md`.
"""

from marjax.sweep.definition import Point, Sweep, grid, load, select
from marjax.sweep.runner import sweep, table

__all__ = ["Point", "Sweep", "grid", "load", "select", "sweep", "table"]
