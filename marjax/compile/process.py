"""Compilation in a child process, so that a crash of the compiler is reported in one line.

libtpu recurses deeply while it estimates the cost of large convolutions, and overflows the usual stack of 8 MiB with a
segmentation fault (128 images of 256 x 256 pixels per chip through the tokenizer). The stack size of its threads is the
process's limit at its start, so the process is started with a large limit; unused stack takes no memory.
"""

import contextlib
import dataclasses
import os
import pathlib
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import ml_collections
from jax.sharding import Mesh

import marjax
from marjax import config as config_lib
from marjax import progress, sharding
from marjax.compile import programs
from marjax.compile.programs import Compiled, CompilerError, Lowered
from marjax.compile.topology import Slice, describe, prepare_environment
from marjax.errors import UserError

STACK = 2**30  # bytes

# `-P` and appending to the path keep modules of the current folder out.
_CHILD = f"""
import sys
sys.path.append({str(pathlib.Path(marjax.__file__).parent.parent)!r})
from marjax.compile.process import serve
serve()
"""


def prepare(config: ml_collections.ConfigDict, topology: str) -> tuple[ml_collections.ConfigDict, Slice, Mesh]:
    """Returns the resolved config, the slice and its mesh. Raises UserError: no such slice, or no such mesh on it."""
    config = config_lib.resolve(config)
    described = describe(topology)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=described.devices)
    return config, described, mesh


def compile_program(
    lowered: Lowered, config: ml_collections.ConfigDict, topology: str, *, cached: bool = False, keep_text: bool = False
) -> Compiled:
    """Runs `programs.compile_program` for a described slice in a child process.

    Args:
      lowered: the program of `config`; the child lowers it again.
      config: resolved.
      topology: see `topology.describe`.
      cached: see `programs.lowered_programs`.
      keep_text: keep the program's HLO text.

    Raises:
      CompilerError: the compiler gave up or crashed.
      UserError: see `programs.lowered_programs`.
    """
    with tempfile.TemporaryFile() as log, progress.activity(f"compiling {lowered.name} for {topology}"):
        with _large_stack():
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
            )
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has already exited; its exit code tells why
                child.stdin.write(pickle.dumps((config, topology, lowered.name, cached, keep_text)))
                child.stdin.flush()
            reply = child.stdout.read()
            child.wait()
        finally:  # Ctrl-C included
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if child.returncode:
            log.seek(0)
            raise CompilerError(_crash(lowered.name, child.returncode, log.read().decode(errors="replace")))
    made = pickle.loads(reply)
    if isinstance(made, UserError):
        raise made
    return dataclasses.replace(made, lowered=lowered)


def serve() -> None:
    """Runs the child process: reads the request from stdin and writes only the reply to stdout."""
    prepare_environment()
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    config, topology, name, cached, keep_text = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    made: Any
    try:
        config, described, mesh = prepare(config, topology)
        (lowered,) = programs.lowered_programs(config, mesh, (name,), cached)
        made = programs.compile_program(lowered, mesh, described.chip.usable, keep_text)
        made = dataclasses.replace(made, lowered=dataclasses.replace(lowered, lower=None))
    except UserError as error:
        made = error
    with answer:
        pickle.dump(made, answer)
    sys.stderr.flush()
    os._exit(0)  # libtpu has nothing to save, and may crash while it is unloaded


def _end_with_parent() -> None:
    """Ends this process when its parent has ended."""
    os.read(0, 1)
    os._exit(1)


@contextlib.contextmanager
def _large_stack() -> Iterator[None]:
    """Gives processes started in this context a stack of STACK bytes, or as much as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    size = STACK if hard == resource.RLIM_INFINITY else min(STACK, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def _crash(program: str, code: int, log: str) -> str:
    """Returns a one-line error for a child that ended without a reply."""
    advice = "compile it for another batch size, remat policy or slice"
    if code == -signal.SIGKILL:
        return f"{program}: the compiler was killed (SIGKILL), probably for lack of memory; use a larger machine"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"{program}: the TPU compiler crashed ({name}); {advice}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "no message"
    return f"{program}: the compiler exited with {code} ({last}); {advice}"
