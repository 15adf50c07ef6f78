"""Runs the points of a sweep on this machine, each in a process of its own.

The process of the sweep never touches an accelerator: the points would find it taken.
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

_READ_LOGS = 1.0  # seconds between looks at what the points print
GRACE = 10.0  # seconds that processes get to end when the sweep is stopped


def run(sweep_run: SweepRun, names: Sequence[str], at_once: int, lock: int | None, ended: Callable[[], Any]) -> None:
    """Runs points, or PREPARE, until all have ended; ends them all where this process is told to stop.

    Args:
      sweep_run: of the sweep.
      names: of the points.
      at_once: points at a time.
      lock: the file descriptor that holds the root's lock, or None; what `marjax.lock.locked` yields.
      ended: called when one has ended.
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
                    tell(name, f"started, log in {_log(sweep_run, name)}")
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
                        _ended(sweep_run, name, process.returncode, time.monotonic() - start)
                        ended()
                        bar.update()
        finally:
            _end([process for process, _ in running.values()])
            for name in running:
                _keep_log(sweep_run, name)
            if is_remote(sweep_run.root):
                shutil.rmtree(_log_folder(sweep_run), ignore_errors=True)


def _start(sweep_run: SweepRun, name: str, lock: int | None) -> "subprocess.Popen[bytes]":
    """The process of a point, `marjax sweep-point`, which sets itself up like any command.

    It leads a session of its own, so that Ctrl-C reaches this process alone and the workers of a point end with it.
    Should this process be killed, it stops, and holds the lock until then.
    """
    sweep_run.failure(name).unlink(missing_ok=True)
    _fetch_log(sweep_run, name)
    with open(_log(sweep_run, name), "a") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {name}\n")
        log.flush()
        command = [*sweep_run.command(name, sys.executable), "--alone", "--parent", str(os.getpid())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
    if name != PREPARE:
        jobs.write(sweep_run, name, jobs.Job("local", f"{socket.gethostname()}:{process.pid}"))
    return process


def _environment() -> dict[str, str]:
    """Of a point's process. Where `python -m marjax` runs in a checkout that is not installed, it finds that too."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(marjax.__file__)))
    if not sys.flags.safe_path and os.path.realpath(root) == os.path.realpath(os.getcwd()):
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{before}{os.pathsep}{root}" if before else root
    return environment


def _log(sweep_run: SweepRun, name: str) -> str:
    """Where a process of this machine prints to: a file, since an address cannot be that."""
    if not is_remote(sweep_run.root):
        return os.fspath(sweep_run.log(name))
    os.makedirs(_log_folder(sweep_run), exist_ok=True)
    return os.path.join(_log_folder(sweep_run), f"{name}.log")


def _last_line(sweep_run: SweepRun, name: str) -> str:
    """What a running point has printed last."""
    with contextlib.suppress(OSError), open(_log(sweep_run, name), "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 400))
        lines = log.read().decode(errors="replace").split("\n")[:-1]
        return lines[-1].strip()[:80] if lines and not lines[-1].startswith("---") else "started"
    return ""


def _log_folder(sweep_run: SweepRun) -> str:
    """Of an address's logs while points run. Not in /tmp, where another user could make it first."""
    digest = hashlib.sha256(os.fspath(sweep_run.root).encode()).hexdigest()[:12]
    return os.path.join(os.path.expanduser("~/.cache/marjax/logs"), digest)


def _fetch_log(sweep_run: SweepRun, name: str) -> None:
    """Begins with what the point has printed before, maybe elsewhere; what this machine has of it may be longer."""
    local = epath.Path(_log(sweep_run, name))
    if is_remote(sweep_run.root) and sweep_run.log(name).exists():
        before = sweep_run.log(name).read_bytes()
        if not local.exists() or local.stat().length < len(before):
            local.write_bytes(before)


def _keep_log(sweep_run: SweepRun, name: str) -> None:
    """Puts the log where it belongs."""
    if is_remote(sweep_run.root):
        write_bytes(sweep_run.log(name), epath.Path(_log(sweep_run, name)).read_bytes())


def _ended(sweep_run: SweepRun, name: str, code: int, seconds: float) -> None:
    """Tells how a point ended, and notes it where its process could not."""
    _keep_log(sweep_run, name)
    state = sweep_run.state(name)
    if state.status == "unfinished" and code == PREEMPTED:
        tell(name, f"preempted after {seconds:.1f} s; start the sweep again to go on")
        return
    if state.status == "unfinished" and (code or name != PREPARE):  # killed, or left without a word
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with open(_log(sweep_run, name), encoding="utf-8", errors="replace") as printed:
            last = printed.read().strip().splitlines()[-1]
        sweep_run.fail(name, how if last.startswith("---") else f"{how}; the last it printed: {last:.200}", seconds)
        state = sweep_run.state(name)
    tell(name, f"failed after {seconds:.1f} s: {state.error}" if state.error else f"finished in {seconds:.1f} s")


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


def tell(name: str, text: str) -> None:
    """A line for who watches."""
    progress.note(f"{time.strftime('%H:%M:%S')} {name.lstrip('_')}: {text}", sys.stdout)
