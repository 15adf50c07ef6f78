"""Runs the points of a sweep, each in a process of its own, and keeps the table.

The process of the sweep never touches an accelerator: the points would find it taken.
"""

import contextlib
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from marjax.errors import TrainingError, UserError
from marjax.generation.images import make_folder
from marjax.sweep.definition import select
from marjax.sweep.points import PREPARE, Plan
from marjax.sweep.rows import Row, last_metrics, write_table

GRACE = 10.0  # seconds that processes get to end when the sweep is stopped


def sweep(path: str | os.PathLike[str], root: str | os.PathLike[str], *, jobs: int = 1,
          only: str | Sequence[str] | None = None) -> list[Row]:
    """Runs what is not finished of the sweep in file `path`; returns the rows of the table.

    A finished point is skipped; one whose config has changed since fails. A point that fails leaves the others alone.
    SIGINT and SIGTERM end the points that run; they resume from their checkpoints when the sweep is started again.

    Args:
      path: the sweep file; configs in it are relative to the current directory.
      root: local folder for everything; made if need be.
      jobs: points at a time. They share the devices: more than one needs CPUs, or a GPU without preallocation.
      only: names of the points to run, or one string of them with commas between; None for all.

    Returns:
      Rows of all points; "status" is "done", "failed" (then "error" says why) or "unfinished".

    Raises:
      UserError: a file, point or folder that cannot be used, before anything runs; or another sweep in this folder.
      TrainingError: `prepare` failed.
    """
    if jobs < 1:
        raise UserError(f"jobs is {jobs}: give at least 1")
    plan = Plan.of(path, root)
    chosen = list(plan.configs) if only is None else select(only, list(plan.configs))
    make_folder(plan.root / "logs")
    with _locked(plan.root) as lock:
        waiting = []
        for name in chosen:
            state = plan.state(name)
            if state.status == "done":
                _tell(name, "finished before, skipped")
            elif state.conflict:
                _tell(name, f"failed: {state.error}")
            else:
                waiting.append(name)
        _write(plan)
        if waiting and plan.sweep.prepare is not None:
            _run(plan, [PREPARE], 1, lock)
            if plan.state(PREPARE).status == "failed":
                raise TrainingError(f"prepare failed: {plan.state(PREPARE).error}; see {plan.log(PREPARE)}")
        _run(plan, waiting, jobs, lock)
        rows = _write(plan)
        if plan.sweep.report is not None:
            plan.sweep.report(plan.root, rows)
        return rows


def table(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[Row]:
    """The rows of the table as `sweep` returns them, from what is in `root`; writes it anew, and runs nothing.

    Raises:
      UserError: a file or point that cannot be used, or no such folder.
    """
    plan = Plan.of(path, root)
    if not plan.root.is_dir():
        raise UserError(f"root {os.fspath(root)} does not exist: give the --root of a sweep")
    return _write(plan)


def _write(plan: Plan) -> list[Row]:
    """Writes the table of what is on disk; one row a point, or one a measured line."""
    varying, rows = plan.varying(), []
    for name in plan.configs:
        state = plan.state(name)
        last = {"status": state.status, "seconds": state.seconds, "error": state.error}
        for measured in state.measured or [{}]:
            rows.append({"point": name, **varying[name], **last_metrics(plan.root / name), **measured,
                         **{key: value for key, value in last.items() if value is not None}})
    write_table(plan.root, rows, list(next(iter(varying.values()))))
    return rows


def _run(plan: Plan, names: Sequence[str], jobs: int, lock: int) -> None:
    """Runs points, or PREPARE, until all have ended; ends them all where this process is told to stop."""
    waiting = list(names)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    with _caught_signals() as caught:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not caught:
                    name = waiting.pop(0)
                    _tell(name, f"started, log in {plan.log(name)}")
                    running[name] = _start(plan, name, lock), time.monotonic()
                if caught:
                    raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(128 + caught[0])
                time.sleep(0.1)
                for name, (process, start) in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        _ended(plan, name, process.returncode, time.monotonic() - start)
        finally:
            _end([process for process, _ in running.values()])


def _start(plan: Plan, name: str, lock: int) -> "subprocess.Popen[bytes]":
    """The process of a point, `marjax sweep-point`, which sets itself up like any command.

    It leads a session of its own, so that Ctrl-C reaches this process alone and the workers of a point end with it;
    and it holds the lock, should this process be killed.
    """
    plan.failure(name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "marjax", "sweep-point", plan.path, "--root", str(plan.root), "--name", name]
    with plan.log(name).open("a") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {name}\n")
        log.flush()
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True, pass_fds=(lock,))


def _ended(plan: Plan, name: str, code: int, seconds: float) -> None:
    """Tells how a point ended, and notes it where its process could not."""
    state = plan.state(name)
    if state.status == "unfinished" and (code or name != PREPARE):  # killed, or left without a word
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        last = plan.log(name).read_text(errors="replace").strip().splitlines()[-1]
        plan.fail(name, how if last.startswith("---") else f"{how}; the last it printed: {last:.200}", seconds)
        state = plan.state(name)
    _tell(name, f"failed after {seconds:.1f} s: {state.error}" if state.error else f"finished in {seconds:.1f} s")
    _write(plan)


def _end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Ends processes and their own children."""
    for process in processes:
        _kill(process, signal.SIGTERM)
    limit = time.monotonic() + GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, limit - time.monotonic()))
        _kill(process, signal.SIGKILL)  # what is left of its session
        process.wait()


def _kill(process: "subprocess.Popen[bytes]", signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """A list that the signals to stop are put on, in the main thread; those that are ignored stay so (nohup)."""
    caught: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _locked(root: pathlib.Path) -> Iterator[int]:
    """Holds the lock of a root folder; yields its file descriptor. Raises UserError if another sweep has it."""
    with (root / "sweep.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another sweep runs in {root} (or points of one that was killed still do): wait for it, "
                            f"or give another --root") from None
        yield file.fileno()


def _tell(name: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name.lstrip('_')}: {text}", flush=True)
