"""The JAX processes of a run: connecting, agreeing, handling preemption, and ending when one is lost.

Commands call `start`; importing this module has no effect. JAX detects Slurm steps, Open MPI, Cloud TPU VMs and GKE.
JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID override what it detects. Without
any of these a run has one process.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marjax import numerics
from marjax.errors import LOST_PEER, InterruptedRunError, LostPeerError, PreemptedError, UserError, causes, first_line
from marjax.interrupts import Listener

HEARTBEAT = "MARJAX_HEARTBEAT_SECONDS"
_DEFAULT_HEARTBEAT = 60
_LOG_AFTER = 15.0  # seconds
# How long the first process to finish waits for the others, which may still be writing, before JAX ends them all.
# Heartbeats detect a dead process.
_SHUTDOWN_TIMEOUT = 24 * 3600  # seconds
_WIDTH = 1024  # bytes of a text that processes exchange
_PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy", "no_proxy")

# Size and rank variables of MPIs that JAX does not detect.
_MPI = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))


class _Notice:
    """Preemption notice of a run with one process; the previous SIGTERM handler; the listener for Ctrl-C."""

    given = False
    before: Any = None
    interrupts: Listener | None = None


def start(*, stops_at_steps: bool = False, alone: bool = False) -> None:
    """Connects this process to the others of its run, if any; call it before devices are used.

    A second call does nothing. If a process dies, the others end within MARJAX_HEARTBEAT_SECONDS (60).

    Args:
      stops_at_steps: whether SIGTERM and Ctrl-C are preemption notices, which `preempted` reports at a common step.
      alone: run as one process whatever the environment.

    Raises:
      UserError: settings are incomplete or invalid.
      LostPeerError: process 0 cannot be reached. If it can, but another process is missing, XLA ends this one, also
        with exit code LOST_PEER.
    """
    if jax.distributed.is_initialized():
        return
    if alone:
        if stops_at_steps:
            _listen()
        return
    given = _settings()
    jax.config.update("jax_enable_preemption_service", stops_at_steps)
    _start(given, stops_at_steps)
    if stops_at_steps and jax.distributed.is_initialized() and _is_main_thread():
        # JAX's preemption service handles only SIGTERM.
        _Notice.interrupts = Listener(lambda: os.kill(os.getpid(), signal.SIGTERM))


def _start(given: dict[str, Any], stops_at_steps: bool) -> None:
    heartbeat = _heartbeat()
    waiting = threading.Timer(_LOG_AFTER, _log_waiting, [given])
    waiting.daemon = True
    waiting.start()
    try:
        with _without_proxies():
            jax.distributed.initialize(
                **given, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT
            )
    except ValueError as error:
        if given or "should be defined" not in str(error):
            raise UserError(
                f"the processes of this run cannot connect ({first_line(error)[:300]}); set "
                f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from None
        if stops_at_steps:
            _listen()
    except RuntimeError as error:
        if "before any JAX" in str(error) and not given:  # called in a session that already uses its devices
            if stops_at_steps:
                _listen()
            return
        raise LostPeerError(
            f"the processes of this run cannot connect ({first_line(error)[:300]}); start all of them within five "
            f"minutes"
        ) from None
    finally:
        waiting.cancel()


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Hides proxy variables, which keep processes from reaching each other and metadata servers.

    Afterwards they are restored for storage, except for gRPC, which libtpu connects hosts with.
    """
    proxies = {name: value for name, value in os.environ.items() if name.lower() in _PROXIES}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(proxies)
        if proxies:
            os.environ |= {"grpc_proxy": ""}


def _log_waiting(given: Mapping[str, Any]) -> None:
    settings = ", ".join(f"{name} {value}" for name, value in given.items())
    print(
        f"marjax: waiting for the other processes of this run{f' ({settings})' if settings else ''}; all must start "
        f"within five minutes",
        file=sys.stderr,
        flush=True,
    )


def _settings() -> dict[str, Any]:
    """Arguments for `jax.distributed.initialize`; it detects those that are missing."""
    given: dict[str, Any] = {}
    for key, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
        if variable in os.environ:
            if not os.environ[variable].isdecimal():
                raise UserError(f"{variable} is {os.environ[variable]!r}, expected an integer")
            given[key] = int(os.environ[variable])
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None:
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}, expected host:port of process 0")
        given["coordinator_address"] = address
    for size, rank in _MPI:
        if address is not None and size in os.environ and rank in os.environ:
            given.setdefault("num_processes", int(os.environ[size]))
            given.setdefault("process_id", int(os.environ[rank]))
        elif (
            int(os.environ.get(size, "1")) > 1
            and "OMPI_MCA_orte_hnp_uri" not in os.environ
            and "SLURM_STEP_NODELIST" not in os.environ
            and not given
        ):
            raise UserError(
                f"{size} is {os.environ[size]}, but the host of process 0 is unknown; set "
                f"JAX_COORDINATOR_ADDRESS=host:port for all processes"
            )
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" in os.environ:
        given.setdefault(
            "num_processes", int(os.environ["SLURM_STEP_NUM_TASKS"])
        )  # JAX counts the tasks of the job instead
    return given


def _heartbeat() -> int:
    text = os.environ.get(HEARTBEAT, str(_DEFAULT_HEARTBEAT))
    if not text.isdecimal() or int(text) < 5:
        raise UserError(f"{HEARTBEAT} is {text!r}, expected a number of seconds, at least 5")
    return int(text)


def _listen() -> None:
    """Handles the first SIGTERM as a preemption notice; a second one ends the process."""

    def notice(number: int, _: Any) -> None:
        _Notice.given = True
        signal.signal(number, signal.SIG_DFL)

    def interrupted() -> None:
        _Notice.given = True

    if _is_main_thread():
        _Notice.given, _Notice.before = False, signal.signal(signal.SIGTERM, notice)
        _Notice.interrupts = Listener(interrupted)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def preempted(step: int) -> bool:
    """Whether to save and stop after this step: true at the same step on all processes, soon after SIGTERM to any.

    All processes must call this after every step. It does not block.
    """
    if jax.distributed.is_initialized():
        try:
            return multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError:  # the caller initialized JAX without the preemption service
            return False
    return _Notice.given


def preempted_before(step: int) -> bool:
    """Whether any process received SIGTERM before the first step of this start, `step` + 1.

    All processes must call this once, before `preempted`. JAX stops them one step after the largest step that any has
    reported. If none has, that is step 1, which a resumed run never asks about. So each process reports `step`, then
    asks about step 1 while another stands at `step`: a notice in between then means `step` + 1, as it should.
    """
    if not jax.distributed.is_initialized():
        return _Notice.given
    stops = preempted(step)
    any_process(stops)  # barrier: all stand at `step`
    for turn in (True, False):
        if turn == (jax.process_index() == 0):
            stops = preempted(1) or stops
            preempted(step)
        stops = any_process(stops)
    return stops


def stopped(when: str) -> PreemptedError:
    """The error of a run that `preempted` stopped; its type tells whether by Ctrl-C to any process. A barrier."""
    interrupted = any_process(_Notice.interrupts is not None and _Notice.interrupts.given)
    kind = InterruptedRunError if interrupted else PreemptedError
    return kind(f"{when}; the same command resumes")


def agree(problem: str) -> str:
    """The first problem of any process, with its index, or "": all processes continue, or none. A barrier."""
    if jax.process_count() == 1:
        return problem
    texts = [text for text in _texts(problem) if text[1]]
    return f"process {texts[0][0]}: {texts[0][1]}" if texts else ""


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. A barrier."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array([flag])).any())


def on_first(action: Callable[[], Any]) -> None:
    """Runs `action` on process 0; the others wait. Raises its UserError on all."""
    problem = ""
    if jax.process_index() == 0:
        try:
            action()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            problem = str(error)
    if jax.process_count() > 1:
        problem = dict(_texts(problem))[0]
    if problem:
        raise UserError(problem)


@contextlib.contextmanager
def first_holds(lock: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Holds a lock (see `marjax.lock`) in process 0, on behalf of all. Raises its UserError on all."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(lock))
        yield


@numerics.pinned()
def check(mesh: Mesh, settings: Mapping[str, Any]) -> str:
    """Checks that processes agree and devices add correctly, and describes the run in one line.

    Args:
      mesh: a mesh of all devices.
      settings: JSON values that must be equal on all processes, such as the config.

    Raises:
      UserError: processes have different versions or settings.
      RuntimeError: the sum over all devices is wrong.
    """
    begun = time.perf_counter()
    versions = {name: _version(name) for name in ("marjax", "jax", "jaxlib", "libtpu")}
    digest = hashlib.sha256(json.dumps([versions, settings], sort_keys=True, default=str).encode()).hexdigest()
    digests = [text for _, text in _texts(digest)]
    odd = [index for index, each in enumerate(digests) if each != digests[0]]
    if odd:
        raise UserError(
            f"process {', '.join(map(str, odd))} of {len(digests)} has another config or other versions of marjax or "
            f"JAX than process 0; run the same command from the same installation on all"
        )
    count, axes = mesh.size, tuple(mesh.axis_names)
    sharded, replicated = NamedSharding(mesh, PartitionSpec(axes)), NamedSharding(mesh, PartitionSpec())
    numbers = jax.make_array_from_callback((count,), sharded, lambda index: np.arange(count, dtype=np.int32)[index])
    total = int(jax.jit(lambda x: jnp.sum(x, dtype=jnp.int32), out_shardings=replicated)(numbers))
    if total != count * (count - 1) // 2:
        raise RuntimeError(
            f"self-check failed: the sum over {count} devices is {total}, expected {count * (count - 1) // 2}; look "
            f"for a faulty chip or link"
        )
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''}, {count} devices "
        f"({jax.devices()[0].device_kind}), mesh {shape}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f"; all agree after {time.perf_counter() - begun:.1f} s"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _texts(text: str) -> list[tuple[int, str]]:
    """(process index, text) of every process, texts cut to _WIDTH bytes. A barrier."""
    if jax.process_count() == 1:
        return [(0, text)]
    line = np.zeros(_WIDTH, np.uint8)
    encoded = np.frombuffer(text.encode()[:_WIDTH], np.uint8)
    line[: encoded.size] = encoded
    lines = np.asarray(multihost_utils.process_allgather(line)).reshape(-1, _WIDTH)
    return [(index, bytes(each).rstrip(b"\0").decode(errors="replace")) for index, each in enumerate(lines)]


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error or one of its causes is the loss of another process of this run."""
    for each in causes(error):
        if isinstance(each, LostPeerError):
            return True
        text = str(each)
        if isinstance(each, jax.errors.JaxRuntimeError) and not re.match(
            r"(RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED|FAILED_PRECONDITION|NOT_FOUND)", text
        ):
            return True
        if re.search(r"DEADLINE_EXCEEDED|Barrier|heartbeat|coordination service|Connection (closed|reset)", text):
            return True
    return False


def stop() -> None:
    """Undoes `start`. A barrier, so that no process takes another's end for a failure."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    if _Notice.before is not None:
        signal.signal(signal.SIGTERM, _Notice.before)
        _Notice.given, _Notice.before = False, None
    if _Notice.interrupts is not None:
        _Notice.interrupts.close()
        _Notice.interrupts = None


def end(code: int, failure: BaseException | None) -> int:
    """The exit code of a command that ends with `code`, after `failure` if any.

    In a run of several processes, one that fails exits here at once: the others may be waiting for it, and end then.
    """
    try:
        alone = not jax.distributed.is_initialized() or jax.process_count() == 1
        first = alone or jax.process_index() == 0
    except RuntimeError:  # the devices cannot be used; the other processes may be waiting
        alone = first = False
    if alone:
        stop()
        return code
    if failure is None:  # finished or preempted together
        try:
            stop()
            return code
        except Exception as error:
            failure = error
            print(f"marjax: other processes failed while ending: {first_line(error)[:300]}", file=sys.stderr)
    code = LOST_PEER if failure is not None and is_lost_peer(failure) else code
    sys.stdout.flush()
    sys.stderr.flush()
    if first:
        time.sleep(3.0)  # it serves all others, so it ends last
    os._exit(code)
