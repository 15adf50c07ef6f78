"""Real processes on this machine that JAX joins to one run; they can be killed.

They are forked from a server that has imported marjax once and has touched no device: a process is there in a moment,
where a fresh interpreter would import for seconds.
"""

import contextlib
import gc
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from support.paths import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "marjax.cli",
        "marjax.training.train",
        "marjax.tokenizer_training.autoencoder",
        "marjax.training.latent_cache",
        "marjax.evaluation.evaluate",
        "marjax.distributed",
        "sklearn.datasets",
    ]
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def _run(
    variables: Mapping[str, str],
    devices: int,
    log: pathlib.Path,
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(variables)
    gc.freeze()
    gc.set_threshold(200_000, 50, 50)  # see conftest.py
    import jax

    from marjax.perf import peak

    jax.config.update("jax_num_cpu_devices", devices)
    peak.device_peak = lambda dtype: 1e11  # type: ignore[assignment]  # every start of a run measures it anew, with all cores
    code = target(*arguments)
    sys.stdout.flush()
    sys.exit(code)


class Run:
    """Processes that all call `target(*arguments)`, whose result is their exit code; alone, or joined by JAX.

    A context manager: on leaving it none of them is left.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        target: Callable[..., Any],
        *arguments: Any,
        count: int = 1,
        devices: int = 1,
        heartbeat: float = 10,
        alone: bool | None = None,
        each: bool = False,
    ) -> None:
        """`each`: the process's number comes first among the arguments."""
        folder = pathlib.Path(folder)
        variables = [{"MARJAX_HEARTBEAT_SECONDS": str(heartbeat)} for _ in range(count)]
        if not (count == 1 if alone is None else alone):
            address = f"localhost:{free_port()}"
            for index, given in enumerate(variables):
                given |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(index),
                }
        self.logs = [folder / f"process{index}.log" for index in range(count)]
        self.processes = [
            CONTEXT.Process(target=_run, args=(given, devices, log, target, ((index,) if each else ()) + arguments))
            for index, (given, log) in enumerate(zip(variables, self.logs, strict=True))
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def wait(self, seconds: float = 240) -> list[int | None]:
        """The exit codes; a signal's is negative. Fails the test if one does not end."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"still running after {seconds} s: {codes}\n{self.said()}"
        return codes

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        """Until it is true. Fails the test if it does not become so, or all processes end before."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and any(process.is_alive() for process in self.processes), self.said()
            time.sleep(0.01)

    def said(self) -> str:
        """The last that each has printed."""
        return "\n".join(f"{log.name}: {log.read_text()[-20_000:] if log.exists() else ''}" for log in self.logs)


def steps_of(workdir: str | os.PathLike[str]) -> list[int]:
    """The steps of the checkpoints that are complete."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(
            int(path.name) for path in (pathlib.Path(workdir) / "checkpoints").iterdir() if path.name.isdecimal()
        )
    return []


def command(*arguments: Any) -> int:
    """`marjax` with these arguments."""
    from marjax.cli import main

    return main(list(map(str, arguments)))


def run_program(
    module: str, *arguments: Any, devices: int | None = None, check: bool = True, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments` to its end; the module may be one of `support`.

    Args:
      devices: the number of CPU devices that JAX has in it.
      check: fail the test where the program fails.
      settings: environment variables beside those of the tests.
    """
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"} | settings
    if devices is not None:
        flags = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert not (check and done.returncode), done.stderr[-5000:]
    return done
