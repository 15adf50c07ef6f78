"""The points of a sweep on disk: their resolved configs, their records of success and failure, and the work of one.

Used by the process of the sweep, which never touches an accelerator, and by the process of each point.
"""

import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax import storage
from marjax.errors import PreemptedError, StorageError, TrainingError, UserError, first_line
from marjax.json_file import read_json
from marjax.paths import takes_paths
from marjax.sweep.definition import Row, Sweep, load
from marjax.sweep.rows import FIXED_COLUMNS, write_text
from marjax.workdir import FREE_FIELDS, read_workdir

_RESULT = {"fingerprint": str, "rows": [{str: (float, bool, str, None)}], "seconds": float}
ORPHAN_SECONDS = 15.0
PREPARE = "_prepare"  # stands for `prepare` in place of a point's name, which cannot start with an underscore


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a point.

    Attributes:
      status: "done", "failed" or "unfinished".
      measured: measured rows of a finished point.
      seconds: run time of the process that finished or failed.
      error: why it failed.
      conflict: whether it was finished with another config, so that running it again would not help.
    """

    status: str
    measured: list[Row] = dataclasses.field(default_factory=list)
    seconds: float | None = None
    error: str | None = None
    conflict: bool = False


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A sweep with validated configs, and its root folder.

    Attributes:
      path: the sweep file.
      root: the root folder, which may not exist yet.
      sweep: the loaded sweep.
      configs: resolved config of each point by name, in the sweep's order.
    """

    path: str
    root: epath.Path
    sweep: Sweep
    configs: dict[str, ConfigDict]

    @classmethod
    @takes_paths("path", "root")
    def open(cls, path: str | os.PathLike[str], root: str | os.PathLike[str]) -> "SweepRun":
        """Loads the file and resolves the config of every point. Raises UserError, which names the point."""
        storage.check(root)
        loaded = load(path)
        configs = {}
        for point in loaded.points:
            try:
                config = config_lib.apply_overrides(config_lib.load(point.config), point.overlay)
                configs[point.name] = config_lib.resolve(config)
            except UserError as error:
                raise UserError(f"point {point.name!r}: {error}") from None
        return cls(os.fspath(path), epath.Path(root), loaded, configs)

    def log(self, name: str) -> epath.Path:
        """Path of the output of a point's process."""
        return self.root / "logs" / f"{name}.log"

    def failure(self, name: str) -> epath.Path:
        """Path of a failure record; outside the work directory, which may not exist or may belong to another config."""
        return self.root / "logs" / f"{name}.failed.json"

    def job(self, name: str) -> epath.Path:
        """Path of a point's `jobs.Job`."""
        return self.root / "jobs" / f"{name}.json"

    def command(self, name: str, python: str) -> list[str]:
        """Command of a point's process, or of PREPARE's; it imports nothing from the current folder."""
        return [python, "-P", "-m", "marjax", "sweep-point", self.path, "--root", os.fspath(self.root), "--name", name]

    def state(self, name: str) -> State:
        """Reads the state of a point, or of PREPARE, from its files."""
        result = _read_record(self.root / name / "result.json", _RESULT)
        if result is not None:
            if result["fingerprint"] == fingerprint(self.configs[name]):
                return State("done", result["rows"], result["seconds"])
            return State("failed", error=self._conflict(name), conflict=True)
        failure = _read_record(self.failure(name), {"error": str, "seconds": float})
        if failure is not None:
            return State("failed", seconds=failure["seconds"], error=failure["error"])
        return State("unfinished")

    def fail(self, name: str, error: str, seconds: float) -> None:
        """Records why a point failed."""
        write_json(self.failure(name), {"error": error, "seconds": round(seconds, 1)})

    def finish(self, name: str, measured: list[Row], seconds: float) -> None:
        """Records that a point is done."""
        result = {"fingerprint": fingerprint(self.configs[name]), "rows": measured, "seconds": round(seconds, 1)}
        write_json(self.root / name / "result.json", result)

    def varying(self) -> dict[str, Row]:
        """Returns, by point, the overlaid fields that differ between points; "config" comes first if it differs."""
        keys = list(dict.fromkeys(key for point in self.sweep.points for key in point.overlay))
        flat = {name: config_lib.flatten(config) for name, config in self.configs.items()}
        fields = {
            point.name: {"config": point.config} | {key: flat[point.name][key] for key in keys}
            for point in self.sweep.points
        }
        varying = [key for key in ["config", *keys] if len({repr(row[key]) for row in fields.values()}) > 1]
        return {name: {key: row[key] for key in varying} for name, row in fields.items()}

    def _conflict(self, name: str) -> str:
        workdir = self.root / name
        try:
            before, after = (_relevant_fields(config) for config in (read_workdir(workdir), self.configs[name]))
        except UserError as error:
            return str(error)
        keys = [key for key in sorted(before) if before[key] != after[key] and key != "tokenizer.checksum"]
        listed = ", ".join(f"{key} (was {before[key]!r}, now {after[key]!r})" for key in keys)
        return (
            f"{workdir} was finished with another config{': ' if listed else ''}{listed}; use another --root or point "
            f"name, or delete its result.json to resume training and measure again"
        )


@takes_paths("path", "root")
def run_point(path: str | os.PathLike[str], root: str | os.PathLike[str], name: str) -> None:
    """Trains and measures a point, and writes its `result.json`; for PREPARE, calls `prepare`.

    A failure is recorded for the table and raised; an earlier record is removed. If several processes run the point,
    all call this function and the first one writes.
    """
    sweep_run = SweepRun.open(path, root)
    if name not in (PREPARE, *sweep_run.configs):
        raise UserError(f"sweep file {path} no longer has the point {name!r}; start the sweep again")
    if name != PREPARE and sweep_run.state(name).status == "done":  # a job queued twice, or restarted after its end
        return
    if is_first_process():
        sweep_run.failure(name).unlink(missing_ok=True)
    start = time.monotonic()
    try:
        if name != PREPARE:
            _train_and_measure(sweep_run, name, start)
        elif sweep_run.sweep.prepare is not None:
            sweep_run.sweep.prepare(sweep_run.root)
    except Exception as error:
        if not _is_retried(error) and is_first_process():
            line = first_line(error, "")
            expected = isinstance(error, UserError | TrainingError)
            sweep_run.fail(name, line if expected else f"{type(error).__name__}: {line}", time.monotonic() - start)
        raise


def _train_and_measure(sweep_run: SweepRun, name: str, start: float) -> None:
    from marjax.training.train import train

    workdir = sweep_run.root / name
    train(sweep_run.configs[name], workdir)
    measured = sweep_run.sweep.measure(workdir, sweep_run.root) if sweep_run.sweep.measure is not None else []
    rows = checked(measured, sweep_run.varying()[name].keys())
    if is_first_process():
        sweep_run.finish(name, rows, time.monotonic() - start)


def end_with_parent(pid: int) -> None:
    """Stops this process, as SIGTERM would, once its parent (the sweep) is gone; kills it after ORPHAN_SECONDS.

    Args:
      pid: pid of the parent, which may be gone already.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os.killpg(os.getpgid(0), signal.SIGKILL)  # including its worker processes

    threading.Thread(target=watch, name="marjax-parent", daemon=True).start()


def is_first_process() -> bool:
    """Whether this is the first of the processes that run a point."""
    import jax  # not needed by the process of the sweep

    return not jax.distributed.is_initialized() or bool(jax.process_index() == 0)


def _is_retried(error: Exception) -> bool:
    """Whether the cause lies outside the point, so that engines start the same command again."""
    import jax

    from marjax import distributed

    if isinstance(error, PreemptedError) or isinstance(storage.explain(error), StorageError):
        return True
    return jax.distributed.is_initialized() and jax.process_count() > 1 and distributed.is_lost_peer(error)


def checked(measured: object, taken: Collection[str] = ()) -> list[Row]:
    """Returns the rows of a `measure` as JSON values: NumPy scalars become Python numbers.

    Raises:
      UserError: not a list of dicts from names to int, float or str, or a name that the table already has.
    """
    if not isinstance(measured, list) or not all(isinstance(row, dict) for row in measured):
        raise UserError(f"measure returned {measured!r:.100}; return a list of dicts, one per row of the table")
    rows = []
    for given in measured:
        row = {key: value.item() if isinstance(value, np.generic) else value for key, value in given.items()}
        for key, value in row.items():
            if not isinstance(key, str) or key in FIXED_COLUMNS or key in taken:
                raise UserError(f"measure returned the column {key!r}, which the table already has; rename it")
            if not isinstance(value, int | float | str):
                raise UserError(f"measure returned {key}={value!r:.100}; expected int, float or str")
        rows.append(row)
    return rows


def fingerprint(config: ConfigDict) -> str:
    """Returns a hash of the fields of a resolved config that can change training or sampling."""
    return hashlib.sha256(json.dumps(_relevant_fields(config), sort_keys=True).encode()).hexdigest()


def _relevant_fields(config: ConfigDict) -> dict[str, Any]:
    free = tuple(key for key in FREE_FIELDS if key != "sample.")  # `measure` may sample
    return {key: value for key, value in config_lib.flatten(config).items() if not key.startswith(free)}


def _read_record(path: epath.Path, shape: Any) -> dict[str, Any] | None:
    """Reads a record; None if it is missing or damaged, with a warning: the point then runs again."""
    try:
        found: dict[str, Any] | None = read_json(path, shape, advice="it is ignored", missing=None, allow_nan=True)
        return found
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return None


def write_json(path: epath.Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
