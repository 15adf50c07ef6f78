"""A sweep as a whole: what of it is still to be done, handed to an engine; its table, and how its points are."""

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
from marjax.sweep.definition import LOCK, select
from marjax.sweep.jobs import QUEUED, RUNNING, UNKNOWN, Job
from marjax.sweep.points import PREPARE, SweepRun
from marjax.sweep.rows import Row, last_metrics, write_table
from marjax.sweep.runner import tell

ENGINES = ("local", "slurm", "xpk")
_ASK = {"local": jobs_lib.local_states, "slurm": slurm.states, "xpk": xpk.states}


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
    """Runs what is not finished of the sweep in file `path`, or submits it; returns the rows of the table.

    A finished point is skipped; one whose config has changed since fails; one whose job is queued or running is left to
    it. A point that fails leaves the others alone. On this machine, SIGINT and SIGTERM end the points that run; they
    resume from their checkpoints when the sweep is started again.

    Args:
      path: the sweep file; configs in it are relative to the current directory.
      root: folder for everything, made if need be; local or gs://, and for other machines one that they see too.
      jobs: points at a time. On this machine 1 by default, and they share the devices: more need CPUs, or a GPU
        without preallocation. Of a Slurm array no limit by default. Not for xpk.
      only: names of the points to run, or one string of them with commas between; None for all.
      engine: "local", for processes of this machine; "slurm" or "xpk", which submit a job a point and return.
      engine_args: of `sbatch` or `xpk workload create`, as in a shell.

    Returns:
      Rows of all points; "status" is "done", "failed" (then "error" says why) or "unfinished".

    Raises:
      UserError: a file, point or folder that cannot be used, before anything runs; or another sweep in this folder.
      TrainingError: `prepare` failed, the engine refused, or, after all else, points were left out because nothing can
        be learnt of their jobs.
    """
    arguments = _checked(engine, engine_args, jobs, root)
    sweep_run = SweepRun.open(path, root)
    chosen = list(sweep_run.configs) if only is None else select(only, list(sweep_run.configs))
    make_folder(sweep_run.root / "logs")
    with locked_folder(sweep_run.root, "marjax sweep", LOCK) as lock:
        waiting, busy, unknown = _waiting(sweep_run, chosen, alone=lock is not None)
        write(sweep_run)
        prepares = bool(waiting) and sweep_run.sweep.prepare is not None
        if prepares and engine != "slurm":  # xpk has no order of workloads: it is done here, before any is made
            runner.run(sweep_run, [PREPARE], 1, lock, lambda: None)
            failed = sweep_run.state(PREPARE)
            if failed.status == "failed":
                raise TrainingError(f"prepare failed: {failed.error}; see {sweep_run.log(PREPARE)}")
        if engine == "local":
            runner.run(sweep_run, waiting, jobs or 1, lock, lambda: write(sweep_run))
        elif waiting:
            _submit(sweep_run, waiting, engine, arguments, jobs, prepares)
            busy = True
        rows = write(sweep_run)
        if sweep_run.sweep.report is not None and not busy and not unknown:
            sweep_run.sweep.report(sweep_run.root, rows)
    if unknown:
        raise TrainingError(
            f"{len(unknown)} of {len(chosen)} points were skipped, since nothing can be learnt here of "
            f"their jobs: {' '.join(unknown)}; where a job has ended, delete its file in "
            f"{sweep_run.root / 'jobs'}, then start the sweep again"
        )
    return rows


@takes_paths("path", "root")
def table(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[Row]:
    """The rows of the table as `sweep` returns them, from what is in `root`; writes it anew, and runs nothing.

    Raises:
      UserError: a file or point that cannot be used, or no such folder.
    """
    return write(_existing(path, root))


@takes_paths("path", "root")
def status(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[str]:
    """A line a point: done, running, queued, failed or unfinished; runs and writes nothing.

    Jobs are asked about where the engine's programs are there (squeue and sacct, kubectl), else their state is unknown.

    Raises:
      UserError: a file or point that cannot be used, or no such folder.
    """
    sweep_run = _existing(path, root)
    given = jobs_lib.read(sweep_run, list(sweep_run.configs))
    states = jobs_lib.states(given, _ASK)
    width = max(len(name) for name in sweep_run.configs)
    return [
        f"{name:<{width}}  {_status(sweep_run, name, given.get(name), states.get(name))}" for name in sweep_run.configs
    ]


def write(sweep_run: SweepRun) -> list[Row]:
    """Writes the table of what is in the root folder; one row a point, or one a measured line. Raises UserError."""
    varying, rows = sweep_run.varying(), []
    for name in sweep_run.configs:
        state = sweep_run.state(name)
        last = {"status": state.status, "seconds": state.seconds, "error": state.error}
        for measured in state.measured or [{}]:
            rows.append(
                {
                    "point": name,
                    **varying[name],
                    **last_metrics(sweep_run.root / name),
                    **measured,
                    **{key: value for key, value in last.items() if value is not None},
                }
            )
    write_table(sweep_run.root, rows, list(next(iter(varying.values()))))
    return rows


def _checked(engine: str, engine_args: str, at_once: int | None, root: str | os.PathLike[str]) -> list[str]:
    """The engine's arguments as a list. Raises UserError."""
    if engine not in ENGINES:
        raise UserError(f"engine is {engine!r}: give one of {', '.join(ENGINES)}")
    check_arguments(jobs=at_once)
    try:
        arguments = shlex.split(engine_args)
    except ValueError as error:
        raise UserError(
            f"engine_args {engine_args!r} cannot be split as a shell would ({error}): mend the quotes"
        ) from None
    if engine == "local" and arguments:
        raise UserError("engine_args are for slurm and xpk: leave them out, or give --engine")
    if engine == "xpk":
        if at_once is not None:
            raise UserError("jobs is not for xpk, whose cluster has its own queue: leave it out")
        xpk.check(arguments)
        if not os.path.isabs(root) and "://" not in os.fspath(root):
            raise UserError(
                f"root {os.fspath(root)} is a folder of this machine, which a workload does not see: give "
                f"a gs:// address, or the absolute path of a mount that both have"
            )
    return arguments


def _waiting(sweep_run: SweepRun, chosen: Sequence[str], alone: bool) -> tuple[list[str], bool, list[str]]:
    """The points to run, whether some jobs are still at work, and the points of whose jobs nothing can be learnt.

    Args:
      sweep_run: of the sweep.
      chosen: names of points.
      alone: whether this has the root's lock, so that no process of a sweep on this machine, or on another that sees
        the same locks, runs a point.
    """
    given = jobs_lib.read(sweep_run, chosen)
    states = jobs_lib.states(given, _ASK | ({"local": jobs_lib.all_ended} if alone else {}))
    waiting, busy, unknown = [], False, []
    for name in chosen:
        state, job = sweep_run.state(name), states.get(name)
        if state.status == "done":
            tell(name, "finished before, skipped")
        elif state.conflict:
            tell(name, f"failed: {state.error}")
        elif job in (QUEUED, RUNNING):
            busy = True
            tell(name, f"{job} as {given[name].engine} {given[name].id}, left to it")
        elif job == UNKNOWN and state.status != "failed":
            unknown.append(name)
            tell(
                name,
                f"given to {given[name].engine} {given[name].id}, of which nothing can be learnt here: skipped; "
                f"if it has ended, delete {sweep_run.job(name)}",
            )
        else:
            waiting.append(name)
    return waiting, busy, unknown


def _submit(
    sweep_run: SweepRun,
    names: Sequence[str],
    engine: str,
    arguments: Sequence[str],
    at_once: int | None,
    prepares: bool,
) -> None:
    if engine == "slurm":
        made = slurm.submit(sweep_run, names, prepare=prepares, at_once=at_once, arguments=arguments)
    else:
        made = xpk.submit(sweep_run, names, arguments=arguments)
    for name, job in made.items():
        tell(name, f"submitted as {engine} {job.id}")


def _status(sweep_run: SweepRun, name: str, job: Job | None, job_state: str | None) -> str:
    state = sweep_run.state(name)
    progress = _progress(sweep_run, name)
    if state.status == "done":
        return f"done{'' if state.seconds is None else f' in {_span(state.seconds)}'}"
    if job is not None and job_state in (QUEUED, RUNNING):
        return f"{job_state} ({job.engine} {job.id}){progress}"
    if state.status == "failed":
        return f"failed: {state.error}{progress}"
    if job is not None and job_state == UNKNOWN:
        return f"submitted ({job.engine} {job.id}, state unknown here){progress}"
    before = sweep_run.state(PREPARE)
    return f"unfinished{progress}" + (f"; prepare failed: {before.error}" if before.status == "failed" else "")


def _progress(sweep_run: SweepRun, name: str) -> str:
    """ ", step 20 of 40, updated 3 min ago" as far as metrics.jsonl says; "" if there is none."""
    last = last_metrics(sweep_run.root / name)
    if "step" not in last:
        return ""
    text = f", step {last['step']} of {sweep_run.configs[name].train.steps}"
    changed = (sweep_run.root / name / "metrics.jsonl").stat().mtime
    return text + (f", updated {_span(max(0.0, time.time() - changed))} ago" if changed else "")


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _existing(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> SweepRun:
    sweep_run = SweepRun.open(path, root)
    if not sweep_run.root.is_dir():
        raise UserError(f"root {os.fspath(root)} does not exist: give the --root of a sweep")
    return sweep_run
