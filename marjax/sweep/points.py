"""The points of a sweep on disk: their resolved configs, what finished and failed ones leave, and the work of one.

Read by the process of the sweep, which never touches an accelerator, and by the process of each point.
"""

import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax import storage
from marjax.errors import PreemptedError, StorageError, TrainingError, UserError, first_line
from marjax.json_file import read_json
from marjax.paths import takes_paths
from marjax.sweep.definition import Sweep, load
from marjax.sweep.rows import FIXED_COLUMNS, Row, write_whole
from marjax.workdir import FREE_FIELDS, read_workdir

_RESULT = {"fingerprint": str, "rows": [{str: (float, bool, str, None)}], "seconds": float}
ORPHAN_SECONDS = 15.0
PREPARE = "_prepare"  # stands for `prepare` in place of a point's name, none of which can start like this


@dataclasses.dataclass(frozen=True)
class State:
    """How far a point is.

    Attributes:
      status: "done", "failed" or "unfinished".
      measured: the lines of a point that is done.
      seconds: of the process that finished it, or failed.
      error: why it failed.
      conflict: failed because it was finished with another config, which running it again would not mend.
    """

    status: str
    measured: list[Row] = dataclasses.field(default_factory=list)
    seconds: float | None = None
    error: str | None = None
    conflict: bool = False


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A sweep whose every config is known to be right, and its root folder.

    Attributes:
      path: the sweep file.
      root: the root folder, which may not exist yet.
      sweep: what the file returns.
      configs: the resolved config of each point, by name, in the sweep's order.
    """

    path: str
    root: epath.Path
    sweep: Sweep
    configs: dict[str, ConfigDict]

    @classmethod
    @takes_paths("path", "root")
    def open(cls, path: str | os.PathLike[str], root: str | os.PathLike[str]) -> "SweepRun":
        """Loads the file, and loads, overlays and resolves every point of it. Raises UserError, naming the point."""
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
        """What the process of a point prints."""
        return self.root / "logs" / f"{name}.log"

    def failure(self, name: str) -> epath.Path:
        """Why a point failed; outside its work directory, which a failed point may not have, or not rightfully."""
        return self.root / "logs" / f"{name}.failed.json"

    def job(self, name: str) -> epath.Path:
        """Which job was given the point, as `jobs.Job` has it."""
        return self.root / "jobs" / f"{name}.json"

    def command(self, name: str, python: str) -> list[str]:
        """What a point's process runs, which imports nothing from the current folder; for PREPARE, `prepare`."""
        return [python, "-P", "-m", "marjax", "sweep-point", self.path, "--root", os.fspath(self.root), "--name", name]

    def state(self, name: str) -> State:
        """What the files of a point say, or of PREPARE."""
        result = _read_note(self.root / name / "result.json", _RESULT)
        if result is not None:
            if result["fingerprint"] == fingerprint(self.configs[name]):
                return State("done", result["rows"], result["seconds"])
            return State("failed", error=self._contradiction(name), conflict=True)
        failure = _read_note(self.failure(name), {"error": str, "seconds": float})
        if failure is not None:
            return State("failed", seconds=failure["seconds"], error=failure["error"])
        return State("unfinished")

    def fail(self, name: str, error: str, seconds: float) -> None:
        """Notes why a point failed."""
        write_json(self.failure(name), {"error": error, "seconds": round(seconds, 1)})

    def finish(self, name: str, measured: list[Row], seconds: float) -> None:
        """Notes that a point is done."""
        write_json(
            self.root / name / "result.json",
            {"fingerprint": fingerprint(self.configs[name]), "rows": measured, "seconds": round(seconds, 1)},
        )

    def varying(self) -> dict[str, Row]:
        """By point, the fields that any overlay names and that differ between points; "config" first if that does."""
        keys = list(dict.fromkeys(key for point in self.sweep.points for key in point.overlay))
        flat = {name: config_lib.flatten(config) for name, config in self.configs.items()}
        fields = {
            point.name: {"config": point.config} | {key: flat[point.name][key] for key in keys}
            for point in self.sweep.points
        }
        varying = [key for key in ["config", *keys] if len({repr(row[key]) for row in fields.values()}) > 1]
        return {name: {key: row[key] for key in varying} for name, row in fields.items()}

    def _contradiction(self, name: str) -> str:
        workdir = self.root / name
        try:
            before, after = (_fields_that_count(config) for config in (read_workdir(workdir), self.configs[name]))
        except UserError as error:
            return str(error)
        keys = [key for key in sorted(before) if before[key] != after[key] and key != "tokenizer.checksum"]
        listed = ", ".join(f"{key} (was {before[key]!r}, now {after[key]!r})" for key in keys)
        return (
            f"{workdir} was finished with another config{': ' if listed else ''}{listed}. Use another --root or "
            f"name, or delete its result.json to train on and measure again, if training may go on"
        )


@takes_paths("path", "root")
def run_point(path: str | os.PathLike[str], root: str | os.PathLike[str], name: str) -> None:
    """What the process of a point does: trains, measures, writes `result.json`. For PREPARE, what `prepare` does.

    A failure is noted for the table, and raised; that of an earlier start is erased. Where the point has several
    processes, all call this, and the first one writes.
    """
    sweep_run = SweepRun.open(path, root)
    if name not in (PREPARE, *sweep_run.configs):
        raise UserError(f"sweep file {path} has no point {name!r} any more: start the sweep again")
    state = State("unfinished") if name == PREPARE else sweep_run.state(name)
    if state.status == "done":  # a job that was queued twice, or started again after its last line
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
        if _goes_on(error):
            raise
        first = first_line(error, "")
        told = first if isinstance(error, UserError | TrainingError) else f"{type(error).__name__}: {first}"
        if is_first_process():
            sweep_run.fail(name, told, time.monotonic() - start)
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
    """Has this process stop as on SIGTERM once its parent, the sweep, is gone; after ORPHAN_SECONDS it is killed.

    Args:
      pid: of the parent, which may be gone already.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os.killpg(os.getpgid(0), signal.SIGKILL)  # its worker processes, too

    threading.Thread(target=watch, name="marjax-parent", daemon=True).start()


def is_first_process() -> bool:
    """Whether this process speaks for all that run a point."""
    import jax  # not needed by the process of the sweep

    return not jax.distributed.is_initialized() or bool(jax.process_index() == 0)


def _goes_on(error: Exception) -> bool:
    """Whether nothing failed that the point could help, so that engines start the same command again."""
    import jax

    from marjax import distributed

    if isinstance(error, PreemptedError) or isinstance(storage.explain(error), StorageError):
        return True
    return jax.distributed.is_initialized() and jax.process_count() > 1 and distributed.is_lost_peer(error)


def checked(measured: Any, taken: Any = ()) -> list[Row]:
    """What a `measure` returned, as JSON can hold it: numpy's numbers as Python's.

    Raises:
      UserError: not a list of dicts of names to int, float or str, or a name that the table has already.
    """
    if not isinstance(measured, list) or not all(isinstance(row, dict) for row in measured):
        raise UserError(f"measure returned {measured!r:.100}: return a list of dicts, one a line of the table")
    rows = []
    for given in measured:
        row = {key: value.item() if isinstance(value, np.generic) else value for key, value in given.items()}
        for key, value in row.items():
            if not isinstance(key, str) or key in FIXED_COLUMNS or key in taken:
                raise UserError(f"measure returned the column {key!r}, which the table has already: rename it")
            if not isinstance(value, int | float | str):
                raise UserError(f"measure returned {key}={value!r:.100}: expected int, float or str")
        rows.append(row)
    return rows


def fingerprint(config: ConfigDict) -> str:
    """Of the fields of a resolved config that can change what is trained or sampled."""
    return hashlib.sha256(json.dumps(_fields_that_count(config), sort_keys=True).encode()).hexdigest()


def _fields_that_count(config: ConfigDict) -> dict[str, Any]:
    free = tuple(key for key in FREE_FIELDS if key != "sample.")  # `measure` may well sample
    return {key: value for key, value in config_lib.flatten(config).items() if not key.startswith(free)}


def _read_note(path: epath.Path, shape: Any) -> dict[str, Any] | None:
    """What a file says; None if there is none or it is damaged, which is printed: the point then runs again."""
    try:
        found: dict[str, Any] | None = read_json(path, shape, advice="it is ignored", missing=None, allow_nan=True)
        return found
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return None


def write_json(path: epath.Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")
