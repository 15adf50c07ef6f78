"""The local engine: runs each point of a sweep in its own process on this machine.

The process of the sweep itself never touches an accelerator, which would make it unavailable to the points.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

import marjax
from marjax import progress
from marjax.errors import PREEMPTED
from marjax.files import write_bytes
from marjax.storage import is_remote
from marjax.sweep import jobs
from marjax.sweep.points import PREPARE, SweepRun

_READ_LOGS = 1.0  # seconds between reads of the points' output
GRACE = 10.0  # seconds for processes to end when the sweep is stopped


def run(sweep_run: SweepRun, names: Sequence[str], at_once: int, lock: int | None, ended: Callable[[], Any]) -> None:
    """Runs points, or PREPARE, until all have ended; a signal to stop ends them all.

    Args:
      sweep_run: the sweep.
      names: names of the points.
      at_once: maximum number of points at a time.
      lock: file descriptor that holds the root's lock, or None, as `marjax.lock.locked` yields it.
      ended: called after each point has ended.
    """
    waiting = list(names)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    read = 0.0
    what = "prepare" if PREPARE in names else "sweep"
    with _caught_signals() as caught, progress.bar(what, len(names), "points") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_once and not caught:
                    name = waiting.pop(0)
                    log(name, f"started, log in {_log_path(sweep_run, name)}")
                    running[name] = _start(sweep_run, name, lock), time.monotonic()
                if caught:
                    raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(128 + caught[0])
                time.sleep(0.1)
                if time.monotonic() - read > _READ_LOGS:
                    read = time.monotonic()
                    bar.detail = "; ".join(f"{name.lstrip('_')}: {_last_line(sweep_run, name)}" for name in running)
                for name, (process, start) in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        _report_exit(sweep_run, name, process.returncode, time.monotonic() - start)
                        ended()
                        bar.update()
        finally:
            _stop([process for process, _ in running.values()])
            for name in running:
                _upload_log(sweep_run, name)
            if is_remote(sweep_run.root):
                shutil.rmtree(_log_folder(sweep_run), ignore_errors=True)


def _start(sweep_run: SweepRun, name: str, lock: int | None) -> "subprocess.Popen[bytes]":
    """Starts the process of a point, `marjax sweep-point`.

    It leads its own session, so that Ctrl-C reaches only this process and a point's workers end with the point. If this
    process is killed, the point stops, and holds the lock until then.
    """
    sweep_run.failure(name).unlink(missing_ok=True)
    _download_log(sweep_run, name)
    with open(_log_path(sweep_run, name), "a") as output:
        output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {name}\n")
        output.flush()
        process = subprocess.Popen(
            [*sweep_run.command(name, sys.executable), "--alone", "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
    if name != PREPARE:
        jobs.write(sweep_run, name, jobs.Job("local", f"{socket.gethostname()}:{process.pid}"))
    return process


def _environment() -> dict[str, str]:
    """Environment of a point; it can import marjax even from a checkout that is not installed (`python -m marjax`)."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(marjax.__file__)))
    if not sys.flags.safe_path and os.path.realpath(root) == os.path.realpath(os.getcwd()):
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{before}{os.pathsep}{root}" if before else root
    return environment


def _log_path(sweep_run: SweepRun, name: str) -> str:
    """Path of the local file that a process of this machine writes its output to."""
    if not is_remote(sweep_run.root):
        return os.fspath(sweep_run.log(name))
    os.makedirs(_log_folder(sweep_run), exist_ok=True)
    return os.path.join(_log_folder(sweep_run), f"{name}.log")


def _log_folder(sweep_run: SweepRun) -> str:
    """Local folder for the logs of a remote root while points run; not in /tmp, where other users could create it."""
    digest = hashlib.sha256(os.fspath(sweep_run.root).encode()).hexdigest()[:12]
    return os.path.join(os.path.expanduser("~/.cache/marjax/logs"), digest)


def _last_line(sweep_run: SweepRun, name: str) -> str:
    """Last line of output of a running point."""
    with contextlib.suppress(OSError), open(_log_path(sweep_run, name), "rb") as output:
        output.seek(max(0, output.seek(0, os.SEEK_END) - 400))
        lines = output.read().decode(errors="replace").split("\n")[:-1]
        return lines[-1].strip()[:80] if lines and not lines[-1].startswith("---") else "started"
    return ""


def _download_log(sweep_run: SweepRun, name: str) -> None:
    """Fetches a point's earlier log from a remote root, unless this machine has a longer one."""
    local = epath.Path(_log_path(sweep_run, name))
    if is_remote(sweep_run.root) and sweep_run.log(name).exists():
        before = sweep_run.log(name).read_bytes()
        if not local.exists() or local.stat().length < len(before):
            local.write_bytes(before)


def _upload_log(sweep_run: SweepRun, name: str) -> None:
    if is_remote(sweep_run.root):
        write_bytes(sweep_run.log(name), epath.Path(_log_path(sweep_run, name)).read_bytes())


def _report_exit(sweep_run: SweepRun, name: str, code: int, seconds: float) -> None:
    """Logs how a point ended, and records a failure that its process could not record."""
    _upload_log(sweep_run, name)
    state = sweep_run.state(name)
    if state.status == "unfinished" and code == PREEMPTED:
        log(name, f"preempted after {seconds:.1f} s; start the sweep again to resume")
        return
    if state.status == "unfinished" and (code or name != PREPARE):  # killed, or ended without a record
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with open(_log_path(sweep_run, name), encoding="utf-8", errors="replace") as output:
            last = output.read().strip().splitlines()[-1]
        sweep_run.fail(name, how if last.startswith("---") else f"{how}; last output: {last:.200}", seconds)
        state = sweep_run.state(name)
    log(name, f"failed after {seconds:.1f} s: {state.error}" if state.error else f"finished in {seconds:.1f} s")


def _stop(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Stops processes and their children."""
    for process in processes:
        _kill(process, signal.SIGTERM)
    limit = time.monotonic() + GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, limit - time.monotonic()))
        _kill(process, signal.SIGKILL)  # the rest of its session
        process.wait()


def _kill(process: "subprocess.Popen[bytes]", signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Yields a list that collects signals to stop (main thread only); ignored signals stay ignored (nohup)."""
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


def log(name: str, text: str) -> None:
    """Prints a timestamped line about a point."""
    progress.note(f"{time.strftime('%H:%M:%S')} {name.lstrip('_')}: {text}", sys.stdout)
