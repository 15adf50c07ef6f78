"""Sweeps: many trainings from one file, a work directory each, resumable, and one table of them all.

A sweep file has `get_sweep`, which returns a Sweep or yields overlays. In the root folder of a sweep lie `NAME/` (the
work directory of a point, with `result.json` once it is finished), `logs/NAME.log`, `jobs/NAME.json` (what runs it),
`table.csv` and `table.md`.
"""

from marjax.sweep.definition import Point, Sweep, grid, load, name_of, select
from marjax.sweep.engines import status, sweep, table

__all__ = ["Point", "Sweep", "grid", "load", "name_of", "select", "status", "sweep", "table"]
