"""Ctrl-C: raised again where Python drops it, a notice where training listens, and the end when it comes twice."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from marjax import cli
from marjax.commands import plot
from marjax.errors import INTERRUPTED
from marjax.interrupts import Listener, never_lost


class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def collected(phase, info):
    gc.callbacks.remove(collected)
    signal.raise_signal(signal.SIGINT)


def drop(how):
    """Ctrl-C comes where Python drops what it raises."""
    if how == "gc":
        gc.callbacks.append(collected)
        gc.collect()
    else:
        Dropped()


@pytest.mark.parametrize("how", ["gc", "del"])
def test_ctrl_c_in_a_callback_ends_a_command(monkeypatch, capsys, how):
    def run(given):
        drop(how)
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            time.sleep(0.005)
        raise AssertionError("it was lost")

    monkeypatch.setattr(plot, "run", run)
    assert cli.main(["plot", "--workdir", "x", "--out", "y"]) == INTERRUPTED
    assert capsys.readouterr().err == "marjax plot: interrupted; run the same command again\n"


def test_what_else_python_drops_goes_to_the_hook_before(monkeypatch):
    class Fails:
        def __del__(self):
            raise ValueError("told")

    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    with never_lost():
        Fails()
    assert seen == ["told"]


def test_the_first_is_a_notice():
    before, given = signal.getsignal(signal.SIGINT), []
    listener = Listener(lambda: given.append(True))
    try:
        os.kill(os.getpid(), signal.SIGINT)
        limit = time.monotonic() + 60
        while not given and time.monotonic() < limit:
            time.sleep(0.005)
        assert given == [True] and listener.given
    finally:
        listener.close()
    assert signal.getsignal(signal.SIGINT) is before


WAITS = """
import time
from marjax.interrupts import Listener
listener = Listener(lambda: print("noticed", flush=True))
print("ready", flush=True)
time.sleep(600)
"""


def test_the_second_ends_the_process():
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as process:
        for line in ("ready", "noticed"):
            assert process.stdout.readline() == f"{line}\n"
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == INTERRUPTED


def test_where_it_is_ignored_it_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Listener(lambda: None).close()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
