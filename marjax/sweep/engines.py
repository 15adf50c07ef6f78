"""Sweeps: finds the points left to run, hands them to an engine, writes the table and reports the status."""

import os
import shlex
import time
from collections.abc import Sequence

from marjax.errors import TrainingError, UserError
from marjax.files import make_folder
from marjax.lock import locked_folder
from marjax.paths import takes_paths
from marjax.ranges import check_arguments
from marjax.sweep import jobs as jobs_lib
from marjax.sweep import runner, slurm, xpk
from marjax.sweep.definition import LOCK, Row, select
from marjax.sweep.jobs import QUEUED, RUNNING, UNKNOWN, Job
from marjax.sweep.points import PREPARE, SweepRun
from marjax.sweep.rows import last_metrics, write_table
from marjax.sweep.runner import log

ENGINES = ("local", "slurm", "xpk")
_STATES = {"local": jobs_lib.local_states, "slurm": slurm.states, "xpk": xpk.states}


@takes_paths("path", "root")
def sweep(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    only: str | Sequence[str] | None = None,
    engine: str = "local",
    engine_args: str = "",
) -> list[Row]:
    """Runs or submits the unfinished points of a sweep file, and returns the rows of the table.

    A finished point is skipped; one whose config has changed since then fails; one whose job is queued or running is
    left to that job. A failed point does not affect the others. On SIGINT and SIGTERM the local engine stops its
    points; they resume from their checkpoints when the sweep is started again.

    Args:
      path: the sweep file; configs in it are relative to the current directory.
      root: root folder, created if missing; local or gs://. Other engines need one that their machines see too.
      jobs: maximum number of points at a time. For "local" the default is 1; points share the devices, so more than one
        needs CPUs, or a GPU without preallocation. For "slurm" the default is no limit. Not for "xpk".
      only: names of the points to run, or one string of them separated by commas; None for all.
      engine: "local" for processes on this machine; "slurm" or "xpk" submit one job per point and return.
      engine_args: arguments for `sbatch` or `xpk workload create`, quoted as in a shell.

    Returns:
      Rows of all points; "status" is "done", "failed" (with "error") or "unfinished".

    Raises:
      UserError: an invalid file, point or folder, before anything runs; or another sweep is running in this folder.
      TrainingError: `prepare` failed, the engine refused, or (after everything else) points were skipped because the
        states of their jobs are unknown.
    """
    arguments = _checked(engine, engine_args, jobs, root)
    sweep_run = SweepRun.open(path, root)
    chosen = list(sweep_run.configs) if only is None else select(only, list(sweep_run.configs))
    make_folder(sweep_run.root / "logs")
    with locked_folder(sweep_run.root, "marjax sweep", LOCK) as lock:
        waiting, busy, unknown = _waiting(sweep_run, chosen, has_lock=lock is not None)
        write(sweep_run)
        prepares = bool(waiting) and sweep_run.sweep.prepare is not None
        if prepares and engine != "slurm":  # xpk cannot order workloads: run it here, before creating any
            runner.run(sweep_run, [PREPARE], 1, lock, lambda: None)
            state = sweep_run.state(PREPARE)
            if state.status == "failed":
                raise TrainingError(f"prepare failed: {state.error}; see {sweep_run.log(PREPARE)}")
        if engine == "local":
            runner.run(sweep_run, waiting, jobs or 1, lock, lambda: write(sweep_run))
        elif waiting:
            if engine == "slurm":
                made = slurm.submit(sweep_run, waiting, prepare=prepares, at_once=jobs, arguments=arguments)
            else:
                made = xpk.submit(sweep_run, waiting, arguments=arguments)
            for name, job in made.items():
                log(name, f"submitted as {engine} {job.id}")
            busy = True
        rows = write(sweep_run)
        if sweep_run.sweep.report is not None and not busy and not unknown:
            sweep_run.sweep.report(sweep_run.root, rows)
    if unknown:
        raise TrainingError(
            f"skipped {len(unknown)} of {len(chosen)} points, whose jobs are in an unknown state: {' '.join(unknown)}; "
            f"if a job has ended, delete its file in {sweep_run.root / 'jobs'} and start the sweep again"
        )
    return rows


@takes_paths("path", "root")
def table(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[Row]:
    """Rewrites the table from the files in `root` without running anything; returns its rows, as `sweep` does.

    Raises:
      UserError: an invalid file or point, or no such folder.
    """
    return write(_existing(path, root))


@takes_paths("path", "root")
def status(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[str]:
    """Returns one line per point: done, running, queued, failed or unfinished; runs and writes nothing.

    The states of jobs are unknown where the engine's programs (squeue and sacct, kubectl) are not installed.

    Raises:
      UserError: an invalid file or point, or no such folder.
    """
    sweep_run = _existing(path, root)
    jobs = jobs_lib.read(sweep_run, list(sweep_run.configs))
    states = jobs_lib.states(jobs, _STATES)
    width = max(len(name) for name in sweep_run.configs)
    return [
        f"{name:<{width}}  {_status(sweep_run, name, jobs.get(name), states.get(name))}" for name in sweep_run.configs
    ]


def write(sweep_run: SweepRun) -> list[Row]:
    """Writes the table: one row per point, or one per measured row of a point. Raises UserError."""
    varying, rows = sweep_run.varying(), []
    for name in sweep_run.configs:
        state = sweep_run.state(name)
        last = {"status": state.status, "seconds": state.seconds, "error": state.error}
        last = {key: value for key, value in last.items() if value is not None}
        first = {"point": name, **varying[name], **last_metrics(sweep_run.root / name)}
        rows += [first | measured | last for measured in state.measured or [{}]]
    write_table(sweep_run.root, rows, list(next(iter(varying.values()))))
    return rows


def _checked(engine: str, engine_args: str, jobs: int | None, root: str | os.PathLike[str]) -> list[str]:
    """Returns the engine's arguments as a list. Raises UserError."""
    if engine not in ENGINES:
        raise UserError(f"engine={engine!r} is unknown; use one of {', '.join(ENGINES)}")
    check_arguments(jobs=jobs)
    try:
        arguments = shlex.split(engine_args)
    except ValueError as error:
        raise UserError(f"engine_args={engine_args!r} is no valid shell syntax ({error}); fix the quotes") from None
    if engine == "local" and arguments:
        raise UserError("engine_args is only for slurm and xpk; omit it, or give --engine")
    if engine == "xpk":
        if jobs is not None:
            raise UserError("jobs is not supported by xpk, whose cluster has its own queue; omit it")
        xpk.check(arguments)
        if not os.path.isabs(root) and "://" not in os.fspath(root):
            raise UserError(
                f"root {os.fspath(root)} is a local folder, which workloads cannot see; give a gs:// address or the "
                f"absolute path of a shared mount"
            )
    return arguments


def _waiting(sweep_run: SweepRun, chosen: Sequence[str], has_lock: bool) -> tuple[list[str], bool, list[str]]:
    """Returns the points to run, whether jobs are queued or running, and the points with jobs of unknown state.

    Args:
      sweep_run: the sweep.
      chosen: names of points.
      has_lock: whether this process holds the root's lock, so that no local engine runs a point, on this machine or
        another one that sees the same locks.
    """
    jobs = jobs_lib.read(sweep_run, chosen)
    states = jobs_lib.states(jobs, _STATES | ({"local": jobs_lib.all_ended} if has_lock else {}))
    waiting, busy, unknown = [], False, []
    for name in chosen:
        state, job_state = sweep_run.state(name), states.get(name)
        if state.status == "done":
            log(name, "already finished, skipped")
        elif state.conflict:
            log(name, f"failed: {state.error}")
        elif job_state in (QUEUED, RUNNING):
            busy = True
            log(name, f"{job_state} as {jobs[name].engine} {jobs[name].id}, left to that job")
        elif job_state == UNKNOWN and state.status != "failed":
            unknown.append(name)
            log(
                name,
                f"skipped: the state of {jobs[name].engine} {jobs[name].id} is unknown here; if that job has ended, "
                f"delete {sweep_run.job(name)}",
            )
        else:
            waiting.append(name)
    return waiting, busy, unknown


def _status(sweep_run: SweepRun, name: str, job: Job | None, job_state: str | None) -> str:
    state = sweep_run.state(name)
    progress = _progress(sweep_run, name)
    if state.status == "done":
        return f"done{'' if state.seconds is None else f' in {_duration(state.seconds)}'}"
    if job is not None and job_state in (QUEUED, RUNNING):
        return f"{job_state} ({job.engine} {job.id}){progress}"
    if state.status == "failed":
        return f"failed: {state.error}{progress}"
    if job is not None and job_state == UNKNOWN:
        return f"submitted ({job.engine} {job.id}, state unknown here){progress}"
    prepare = sweep_run.state(PREPARE)
    return f"unfinished{progress}" + (f"; prepare failed: {prepare.error}" if prepare.status == "failed" else "")


def _progress(sweep_run: SweepRun, name: str) -> str:
    """Returns ", step 20 of 40, updated 3 min ago" from metrics.jsonl; "" if it has no step."""
    last = last_metrics(sweep_run.root / name)
    if "step" not in last:
        return ""
    text = f", step {last['step']} of {sweep_run.configs[name].train.steps}"
    changed = (sweep_run.root / name / "metrics.jsonl").stat().mtime
    return text + (f", updated {_duration(max(0.0, time.time() - changed))} ago" if changed else "")


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _existing(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> SweepRun:
    sweep_run = SweepRun.open(path, root)
    if not sweep_run.root.is_dir():
        raise UserError(f"root {os.fspath(root)} does not exist; give the --root of a sweep")
    return sweep_run
