#!/usr/bin/env python3
"""Starts the JAX processes of a run on the CPU of this machine, to try a config or a failure of a pod.

    python launch/local.py --processes 4 --devices 2 -- marjax train --config digits:debug --workdir runs/try

The processes find each other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Their output is prefixed
by "[2] ". SIGINT and SIGTERM are forwarded to all of them, SIGHUP as SIGTERM. If this launcher is killed, they get
SIGTERM too, and SIGKILL 15 seconds later. It imports neither JAX nor marjax.
"""

import argparse
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PREEMPTED, LOST_PEER = 42, 134  # as in marjax/errors.py
_POLL_SECONDS = 0.05
_KILL_SECONDS = 5.0  # between SIGTERM and SIGKILL of the remaining processes
# Reads process groups, one per line, until the launcher has ended; ends the remaining ones.
_GUARD = """
import os, signal, sys, time
groups = [int(line) for line in sys.stdin]
for number, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 0.0)):
    until = time.monotonic() + seconds
    for group in groups:
        try:
            os.killpg(group, number)
        except OSError:
            pass
    while time.monotonic() < until and groups:
        time.sleep(0.05)
        for group in list(groups):
            try:
                os.killpg(group, 0)
            except OSError:
                groups.remove(group)
"""
_QUICK_SECONDS, _MAX_QUICK = 600.0, 4  # consecutive starts that end so soon by a lost process: give up


def is_retriable(code: int) -> bool:
    """Whether a run with this exit code resumes when restarted: preempted, or a process was killed or lost.

    Not 127: a missing command will stay missing.
    """
    return code == PREEMPTED or code >= 128


def free_port() -> int:
    """Returns a free TCP port of this machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def environment(index: int, processes: int, devices: int, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """`base` and what process `index` has to know, as `marjax.distributed.start` reads it; no proxy between them."""
    direct = {}
    if any(name.lower() in ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy") for name in base):
        hosts = [base.get("no_proxy") or base.get("NO_PROXY") or "", "127.0.0.1", "localhost"]
        direct = dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(filter(None, hosts)))
    return {
        **base,
        **direct,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONUNBUFFERED": "1",
    }


def first_bad(codes: Sequence[int]) -> int:
    """The code that tells most, of processes that ended at the same moment; 0 if none is bad.

    LOST_PEER only says that another one has gone, so the code of that one is preferred.
    """
    bad = [code for code in codes if code]
    return next((code for code in bad if code != LOST_PEER), bad[0] if bad else 0)


class _Signals:
    """Collects signals to stop while it is entered; outside the main thread, where Python takes none, it is idle.

    SIGHUP, of a terminal that is closed, counts as SIGTERM; those that are ignored stay so (nohup).
    """

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.stopped = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: Any) -> None:
        self.waiting.append(signal.SIGTERM if number == signal.SIGHUP else number)
        self.stopped = True


def run(
    command: Sequence[str],
    processes: int,
    devices: int,
    *,
    grace: float = 90.0,
    write: Callable[[str], None] | None = None,
    signals: _Signals | None = None,
) -> int:
    """Runs `command` in all processes at once, and returns when the last has ended.

    Once one has failed, the others have `grace` seconds to notice; those left get SIGTERM, then SIGKILL.

    Args:
      command: the program and its arguments.
      processes, devices: how many processes, and CPU devices in each.
      grace: seconds; marjax's processes notice a lost one in 60.
      write: is given each line, "[i] text"; prints it by default.
      signals: that go on to the processes; by default those that arrive meanwhile.

    Returns:
      0, or the first other exit code there was; 128 + N for a process that signal N ended.

    Raises:
      OSError: the program cannot be started.
    """
    if signals is None:
        with _Signals() as signals:
            return run(command, processes, devices, grace=grace, write=write, signals=signals)
    say = write or _print
    port = free_port()
    children: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    # In a session of its own: it outlives whatever ends this launcher.
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD],
        stdin=subprocess.PIPE,
        bufsize=0,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert guard.stdin is not None
    watched = guard.stdin.fileno()
    try:
        for index in range(processes):
            # Sessions of their own: Ctrl-C in a terminal reaches them once, through here, and whatever a process has
            # started can be ended with it.
            child = subprocess.Popen(
                command,
                env=environment(index, processes, devices, port, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Before it becomes the command: there is no moment when it is not watched.
                preexec_fn=lambda: os.write(watched, b"%d\n" % os.getpid()) and None,
            )
            children.append(child)
        for index, child in enumerate(children):
            readers.append(threading.Thread(target=_forward_lines, args=(child, f"[{index}] ", say), daemon=True))
            readers[-1].start()
        return _wait(children, grace, say, signals)
    finally:
        for child in children:
            _kill_session(child, signal.SIGKILL)  # what a process left behind, too
            child.wait()
        guard.kill()
        guard.wait()
        guard.stdin.close()
        for reader in readers:
            reader.join(timeout=5.0)


def _wait(
    children: Sequence["subprocess.Popen[bytes]"], grace: float, say: Callable[[str], None], signals: _Signals
) -> int:
    code, running, deadline = 0, dict(enumerate(children)), float("inf")
    asked = False
    while running:
        while signals.waiting:
            number = signals.waiting.pop(0)
            for child in running.values():
                child.send_signal(number)
        ended = {index: child.returncode for index, child in running.items() if child.poll() is not None}
        for index in ended:
            del running[index]
        bad = first_bad([128 - value if value < 0 else value for value in ended.values()])
        if bad and not code:
            code, deadline = bad, time.monotonic() + grace
            if bad != PREEMPTED:
                index = next(i for i, value in ended.items() if bad in (value, 128 - value))
                say(
                    f"local: process {index} ended with {bad}"
                    + (f"; the others have {grace:g} s to end" if running else "")
                )
        if running and time.monotonic() > deadline:
            if not asked:
                say(f"local: {', '.join(map(str, running))} still running: ending them")
            for child in running.values():
                _kill_session(child, signal.SIGKILL if asked else signal.SIGTERM)
            asked, deadline = True, time.monotonic() + _KILL_SECONDS
        time.sleep(_POLL_SECONDS)
    return code


def _forward_lines(child: "subprocess.Popen[bytes]", prefix: str, say: Callable[[str], None]) -> None:
    assert child.stdout is not None
    with child.stdout as lines:
        for line in lines:
            say(prefix + line.decode(errors="replace").rstrip("\n"))


def _kill_session(child: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


_printing = threading.Lock()


def _print(line: str) -> None:
    with _printing, contextlib.suppress(OSError):  # whoever read it has gone; the processes must not wait
        print(line, flush=True)


def run_with_restarts(
    command: Sequence[str],
    processes: int,
    devices: int,
    *,
    restarts: int,
    grace: float = 90.0,
    write: Callable[[str], None] | None = None,
) -> int:
    """`run`, and again after an end that is retriable, at most `restarts` times; the exit code of the last.

    Not after SIGINT or SIGTERM to this launcher, which are meant for the run as a whole, nor when a loss of processes
    has ended _MAX_QUICK starts in a row within _QUICK_SECONDS.
    """
    say, quick = write or _print, 0
    with _Signals() as signals:
        for left in reversed(range(restarts + 1)):
            begun = time.monotonic()
            code = run(command, processes, devices, grace=grace, write=write, signals=signals)
            if signals.stopped or not left or not is_retriable(code):
                return code
            quick = quick + 1 if code != PREEMPTED and time.monotonic() - begun < _QUICK_SECONDS else 0
            if quick == _MAX_QUICK:
                say(f"local: ended with {code}; given up, after {quick} starts in a row that did not last")
                return code
            say(f"local: ended with {code}; starting again, {left} restart{'s' * (left > 1)} left")
    raise ValueError(f"restarts is {restarts}: give at least 0")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses and runs; the exit code, 2 after a slip."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the processes may print what the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="local.py",
        usage="local.py [options] -- COMMAND [ARGUMENT ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=_count, default=2, help="default %(default)s")
    parser.add_argument("--devices", type=_count, default=2, help="CPU devices in each; default %(default)s")
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again up to N times after exit code 42 (preempted) or one from 128 up (a process "
        "was lost); default %(default)s",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=90.0,
        metavar="SECONDS",
        help="for the others to end in, once one has failed; default %(default)s",
    )
    parser.add_argument("command", nargs="+", help="what to run, after --")
    given = parser.parse_args(arguments)
    if given.restarts < 0:
        parser.error(f"argument --restarts: {given.restarts}: give at least 0")
    try:
        return run_with_restarts(
            given.command, given.processes, given.devices, restarts=given.restarts, grace=given.grace
        )
    except OSError as error:
        print(f"local.py: error: {given.command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
