"""The JAX processes of a run: how they find each other, agree, are stopped together, and end when one is lost.

`start` is for commands; nothing here is called at import. Slurm steps, Open MPI, Cloud TPU VMs and GKE are detected by
JAX itself. JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID override what is
detected; without any of these a process is alone.
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
_SAID_AFTER = 15.0  # seconds
# The first process to be through waits so long for the others, which may still be writing; then JAX would end them all.
# One that has died is noticed by its heartbeat.
_PATIENCE = 24 * 3600
_WIDTH = 1024  # bytes of a text that travels between processes
_PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy", "no_proxy")

# Number and rank of the processes of an MPI that JAX does not detect itself.
_MPI = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))


class _Notice:
    """Whether a process without others was asked to stop; what SIGTERM did before; who listens for Ctrl-C."""

    given = False
    before: Any = None
    interrupts: Listener | None = None


def start(*, stops_at_steps: bool = False, alone: bool = False) -> None:
    """Connects this process to the others of its run, if there are any. Before the first use of a device.

    A second call does nothing. A process that dies takes the others with it within MARJAX_HEARTBEAT_SECONDS (60).

    Args:
      stops_at_steps: whether SIGTERM and Ctrl-C are a notice that `preempted` gives at a common step, instead of the
        end.
      alone: whether this is a run of one process, whatever the environment says.

    Raises:
      UserError: settings that are incomplete.
      LostPeerError: the first process's machine is not there. Where that is, but not all processes come, XLA itself
        ends this one, with LOST_PEER too.
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
        # JAX's service knows SIGTERM alone.
        _Notice.interrupts = Listener(lambda: os.kill(os.getpid(), signal.SIGTERM))


def _start(given: dict[str, Any], stops_at_steps: bool) -> None:
    waiting = threading.Timer(_SAID_AFTER, _log_waiting, [given])
    waiting.daemon = True
    waiting.start()
    try:
        with _without_proxies():
            jax.distributed.initialize(
                **given, heartbeat_timeout_seconds=_heartbeat(), shutdown_timeout_seconds=_PATIENCE
            )
    except ValueError as error:
        if given or "should be defined" not in str(error):
            raise UserError(
                f"the processes of this run cannot be started: {first_line(error)[:300]}. Give "
                f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from None
        if stops_at_steps:
            _listen()
    except RuntimeError as error:
        if "before any JAX" in str(error) and not given:  # called from a session that has used its devices
            if stops_at_steps:
                _listen()
            return
        raise LostPeerError(
            f"the processes of this run do not find each other ({first_line(error)[:300]}): start all "
            f"of them, within five minutes"
        ) from None
    finally:
        waiting.cancel()


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Hides the proxies of the environment, through which processes do not find each other, nor metadata servers.

    Afterwards they are there again, for storage, except that gRPC, which libtpu connects hosts with, uses none.
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
    said = ", ".join(f"{name} {value}" for name, value in given.items())
    print(
        f"marjax: waiting for the other processes of this run{f' ({said})' if said else ''}: all must start within "
        f"five minutes",
        file=sys.stderr,
        flush=True,
    )


def _settings() -> dict[str, Any]:
    """What `jax.distributed.initialize` is told; nothing, to let it detect everything."""
    given: dict[str, Any] = {}
    for key, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
        if variable in os.environ:
            if not os.environ[variable].isdecimal():
                raise UserError(f"{variable} is {os.environ[variable]!r}: give a whole number")
            given[key] = int(os.environ[variable])
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None:
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"the coordinator's address is {address!r}: give host:port of process 0")
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
                f"{size} says that there are {os.environ[size]} processes of this kind of MPI, whose first "
                f"host is not known: give all of them JAX_COORDINATOR_ADDRESS=host:port"
            )
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" in os.environ:
        given.setdefault("num_processes", int(os.environ["SLURM_STEP_NUM_TASKS"]))  # JAX takes those of the whole job
    return given


def _heartbeat() -> int:
    text = os.environ.get(HEARTBEAT, str(_DEFAULT_HEARTBEAT))
    if not text.isdecimal() or int(text) < 5:
        raise UserError(f"{HEARTBEAT} is {text!r}: give a number of seconds, at least 5")
    return int(text)


def _listen() -> None:
    """Takes SIGTERM as a notice, once: a second one ends the process as usual."""

    def notice(number: int, frame: Any) -> None:
        del frame
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
    """Whether to save and stop after this step; on all processes at the same one, shortly after SIGTERM to any.

    To be called after every step, by all of them, without waiting for anything.
    """
    if jax.distributed.is_initialized():
        try:
            return multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError:  # a caller that has started JAX itself, without the preemption service
            return False
    return _Notice.given


def preempted_before(step: int) -> bool:
    """Whether SIGTERM came to any process before the first step of this start, which is the one after `step`.

    To be called once, by all processes, before `preempted`. JAX has them stop one step after the largest that any has
    told of. Where none has yet, that is step 1, which a run that is resumed never asks about. So each tells of `step`,
    and then asks about 1 while another stands at `step`: a notice that comes in between means step + 1, as it should.
    """
    if not jax.distributed.is_initialized():
        return _Notice.given
    stops = preempted(step)
    any_process(stops)  # all stand at `step`
    for turn in (True, False):
        if turn == (jax.process_index() == 0):
            stops = preempted(1) or stops
            preempted(step)
        stops = any_process(stops)
    return stops


def stopped(when: str) -> PreemptedError:
    """The error of a run that `preempted` has stopped: after Ctrl-C to any process, of another kind. Waits for all."""
    interrupted = any_process(_Notice.interrupts is not None and _Notice.interrupts.given)
    kind = InterruptedRunError if interrupted else PreemptedError
    return kind(f"{when}; the same command resumes")


def agree(problem: str) -> str:
    """The first of all processes' problems, naming the process, or "": all of them go on, or none. Waits for all."""
    if jax.process_count() == 1:
        return problem
    texts = [text for text in _texts(problem) if text[1]]
    return f"process {texts[0][0]}: {texts[0][1]}" if texts else ""


def any_process(flag: bool) -> bool:
    """Whether it is true on any process. Waits for all of them."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array([flag])).any())


def on_first(action: Callable[[], Any]) -> None:
    """Does something on process 0 alone, and waits for it. Raises its UserError on all."""
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
    """Holds a lock (see `marjax.lock`) in process 0, for all of them. Raises its UserError on all."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(lock))
        yield


@numerics.pinned()
def check(mesh: Mesh, settings: Mapping[str, Any]) -> str:
    """One line about the run, once all devices have added up a number, and all processes run the same thing.

    Args:
      mesh: of all devices.
      settings: JSON values that must be the same everywhere, such as the config.

    Raises:
      UserError: another version or other settings on one of the processes.
      RuntimeError: the devices add up wrongly.
    """
    begun = time.perf_counter()
    versions = {name: _version(name) for name in ("marjax", "jax", "jaxlib", "libtpu")}
    digest = hashlib.sha256(json.dumps([versions, settings], sort_keys=True, default=str).encode()).hexdigest()
    digests = [text for _, text in _texts(digest)]
    odd = [index for index, each in enumerate(digests) if each != digests[0]]
    if odd:
        raise UserError(
            f"process {', '.join(map(str, odd))} of {len(digests)} has another config, or other versions "
            f"of marjax or JAX, than process 0: start the same command, from the same installation"
        )
    count, axes = mesh.size, tuple(mesh.axis_names)
    cut, whole = NamedSharding(mesh, PartitionSpec(axes)), NamedSharding(mesh, PartitionSpec())
    numbers = jax.make_array_from_callback((count,), cut, lambda index: np.arange(count, dtype=np.int32)[index])
    total = int(jax.jit(lambda x: jnp.sum(x, dtype=jnp.int32), out_shardings=whole)(numbers))
    if total != count * (count - 1) // 2:
        raise RuntimeError(
            f"the self-check failed: {count} devices added up to {total} instead of "
            f"{count * (count - 1) // 2}; look for a faulty chip or link"
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
    """Every process's text, cut to what travels, with its number. Waits for all of several."""
    if jax.process_count() == 1:
        return [(0, text)]
    line = np.zeros(_WIDTH, np.uint8)
    encoded = np.frombuffer(text.encode()[:_WIDTH], np.uint8)
    line[: encoded.size] = encoded
    lines = np.asarray(multihost_utils.process_allgather(line)).reshape(-1, _WIDTH)
    return [(index, bytes(each).rstrip(b"\0").decode(errors="replace")) for index, each in enumerate(lines)]


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or what it came from, is that another process of this run has gone."""
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
    """Undoes `start`. Waits for all processes, so that none takes another's end for a failure."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    if _Notice.before is not None:
        signal.signal(signal.SIGTERM, _Notice.before)
        _Notice.given, _Notice.before = False, None
    if _Notice.interrupts is not None:
        _Notice.interrupts.close()
        _Notice.interrupts = None


def end(code: int, failure: BaseException | None) -> int:
    """The exit code of a command that ends with `code`, after `failure` if any; does not return if others wait for it.

    Of several processes, one that fails ends at once: the others may be waiting for it, and end when it has gone.
    """
    try:
        alone = not jax.distributed.is_initialized() or jax.process_count() == 1
        first = alone or jax.process_index() == 0
    except RuntimeError:  # the devices cannot be used: the others have theirs, and wait
        alone = first = False
    if alone:
        stop()
        return code
    if failure is None:  # finished, or stopped together
        try:
            stop()
            return code
        except Exception as error:
            failure = error
            print(f"marjax: the other processes did not end in order: {first_line(error)[:300]}", file=sys.stderr)
    code = LOST_PEER if failure is not None and is_lost_peer(failure) else code
    sys.stdout.flush()
    sys.stderr.flush()
    if first:
        time.sleep(3.0)  # it serves all of them, so it goes last
    os._exit(code)
