"""Failures of the machine at the command line: one line that says what to do, and the traceback only if asked for."""

import errno
import os

import pytest

from marjax import cli, failures
from marjax.commands import plot
from marjax.errors import TrainingError, UserError

TPU = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 16.50G of "
    "15.75G hbm."
)
FAILURES = {
    "memory": (MemoryError("Unable to allocate 9 PiB"), "out of memory"),
    "device memory": (RuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\nBuffers:\n..."), "on the device"),
    "memory of a TPU": (RuntimeError(TPU), "on the device.*16.50G of 15.75G"),
    "memory in C++": (RuntimeError("std::bad_alloc"), "out of memory"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), "recursion"),
    "descriptors": (OSError(errno.EMFILE, "Too many open files", "a.txt"), "a.txt: Too many open files; .*ulimit -n"),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", b"a"), "a: Read-only file system"),
    "access": (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied"),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file or directory", "a\nb"), r"a\\nb: No such file or directory"),
    "renaming": (OSError(errno.EIO, "I/O", "a", None, "b"), "a -> b: Input/output error"),
    "threads": (RuntimeError("can't start new thread"), "ulimit -u"),
    "devices": (RuntimeError("Unable to initialize backend 'x': it is not\nknown"), "JAX_PLATFORMS.*not known"),
    "TensorStore": (ValueError("UNKNOWN: Error opening x [os_error_code='28']"), "No space left on device"),
    "two lines": (UserError("one\ntwo\x1b[2J"), r"one\\ntwo\\x1b\[2J$"),
    "also two": (TrainingError("one\ntwo"), "one"),
}


def run(error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(plot, "run", fail)
    code = cli.main(["plot", "--workdir", "x", "--out", "y"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", FAILURES)
def test_one_line(monkeypatch, capsys, name):
    error, says = FAILURES[name]
    code, said = run(error, monkeypatch, capsys)
    assert code == (2 if isinstance(error, UserError) else 1) and said.count("\n") == 1
    assert said.startswith("marjax plot: error: ")
    with pytest.raises(TrainingError, match=says):
        raise TrainingError(said.strip())
    monkeypatch.setenv(failures.TRACEBACK, "1")
    assert ("Traceback" in run(error, monkeypatch, capsys)[1]) == (not isinstance(error, UserError | TrainingError))


def test_what_to_lower_depends_on_the_command():
    for command, field in (
        ("train", "config.train.batch_size"),
        ("sample", "--batch_size"),
        ("stats", "--batch_size"),
        ("train-tokenizer", "config.tokenizer.train.batch_size"),
        ("prepare", "--workers"),
    ):
        text = str(failures.explain(MemoryError("Unable to allocate 9 PiB"), command))
        assert field in text and "9 PiB" in text and " GiB of host memory" in text


def test_devices_that_jax_does_not_know(monkeypatch):
    with pytest.raises(AssertionError) as raised:  # as of JAX_PLATFORMS=cuda where JAX's plugin is missing
        exec(compile("assert False", "site-packages/jax/_src/xla_bridge.py", "exec"))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert "JAX_PLATFORMS=cuda;" in str(failures.explain(raised.value))


def test_other_errors_keep_their_traceback(monkeypatch, capsys):
    for error in (KeyError("x"), OSError("no errno"), ValueError("RESOURCE_EXHAUSTED"), RuntimeError("other")):
        assert failures.explain(error) is None
        code, said = run(error, monkeypatch, capsys)
        assert code == 1 and "Traceback" in said


def test_what_passes_says_nothing_about_a_file():
    for error in (MemoryError(), OSError(errno.EMFILE, ""), PermissionError(errno.EACCES, ""), TimeoutError()):
        assert failures.is_passing(error)
    for error in (FileNotFoundError(errno.ENOENT, ""), OSError(errno.EIO, ""), EOFError(), ValueError("damaged")):
        assert not failures.is_passing(error)
    assert failures.advice(OSError(errno.ENOSPC, "")) != failures.advice(OSError(errno.EMFILE, ""))
    assert os.strerror(errno.ENOSPC) == "No space left on device"


@pytest.mark.parametrize(
    "platforms, extra", [("tpu", "marjax[tpu]"), ("cuda", "marjax[cuda13]"), ("gpu", "cuda12"), ("rocm", "")]
)
def test_devices_that_are_not_there_name_the_extra(monkeypatch, platforms, extra):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    text = str(failures.explain(RuntimeError(f"Unable to initialize backend '{platforms}'")))
    assert extra in text and ("pip install" in text) == bool(extra)


def test_a_failure_while_the_command_line_is_parsed(monkeypatch, capsys):
    def fail(arguments):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(cli, "parse", fail)
    assert cli.main(["plot", "--workdir", "x", "--out", "y"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("marjax plot: error: Too many open files; ") and told.count("\n") == 1
