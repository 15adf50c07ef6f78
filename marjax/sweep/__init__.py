"""Sweeps: many training runs from one file, each in its own work directory, resumable, with one table of results.

A sweep file defines `get_sweep`, which returns a Sweep or yields overlays. The root folder of a sweep holds `NAME/`
(the work directory of a point, with `result.json` once it is finished), `logs/NAME.log`, `jobs/NAME.json` (the job that
runs it), `table.csv` and `table.md`.
"""

from marjax.sweep.definition import Point, Sweep, grid, load, name_of, select
from marjax.sweep.engines import status, sweep, table

__all__ = ["Point", "Sweep", "grid", "load", "name_of", "select", "status", "sweep", "table"]
