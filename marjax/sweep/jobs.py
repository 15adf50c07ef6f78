"""Jobs that were given points: which engine has them under what id, as files in the root folder, and how they are.

The files are all that is needed later: `marjax sweep --status` asks the engine of each job, where its program is there.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from marjax.errors import TrainingError, UserError
from marjax.files import write_bytes
from marjax.json_file import read_json
from marjax.sweep.points import SweepRun, write_json

QUEUED, RUNNING, ENDED, UNKNOWN = "queued", "running", "ended", "unknown"
# Whoever wrote the file: no option of squeue or kubectl but these, of which others would run a program.
_SHAPE = {
    "engine": {"local", "slurm", "xpk"},
    "id": re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,300}"),
    "where": [re.compile(r"--(clusters|context|namespace)=[^-\x00-\x1f][^\x00-\x1f]*")],
}
_SHOWN = 15  # lines of a command that fails


@dataclasses.dataclass(frozen=True)
class Job:
    """What runs a point.

    Attributes:
      engine: "local", "slurm" or "xpk".
      id: "HOST:PID", Slurm's "ARRAY_TASK", or the workload's name.
      where: arguments with which Slurm's programs or kubectl find it, if they need any: of which cluster it is.
    """

    engine: str
    id: str
    where: tuple[str, ...] = ()


def read(sweep_run: SweepRun, names: Sequence[str]) -> dict[str, Job]:
    """The jobs of these points; those that none was given are left out. Raises UserError: a damaged file."""
    jobs = {}
    for name in names:
        found = read_json(
            sweep_run.job(name), _SHAPE, missing=None, advice="delete it if the job of that point has ended"
        )
        if found is not None:
            jobs[name] = Job(found["engine"], found["id"], tuple(found["where"]))
    return jobs


def write(sweep_run: SweepRun, name: str, job: Job) -> None:
    """Notes the job of a point, or of PREPARE. Raises UserError."""
    sweep_run.job(name).parent.mkdir(parents=True, exist_ok=True)
    write_json(sweep_run.job(name), dataclasses.asdict(job))


@contextlib.contextmanager
def submitting(sweep_run: SweepRun, names: Sequence[str]) -> Iterator[None]:
    """Erases how points failed before they are submitted, since their jobs may fail at once.

    If the engine refuses, what was noted of them and of their jobs is put back.
    """
    before = {
        path: path.read_bytes() if path.exists() else None
        for name in names
        for path in (sweep_run.failure(name), sweep_run.job(name))
    }
    for name in names:
        sweep_run.failure(name).unlink(missing_ok=True)
    try:
        yield
    except (UserError, TrainingError):
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, content)
        raise


def states(jobs: dict[str, Job], ask: "dict[str, Callable[[Sequence[Job]], dict[str, str]]]") -> dict[str, str]:
    """QUEUED, RUNNING, ENDED or UNKNOWN by point; `ask` has for each engine what knows the states of ids."""
    found: dict[str, str] = {}
    for engine, asked in ask.items():
        of_engine = {name: job for name, job in jobs.items() if job.engine == engine}
        if of_engine:
            by_id = asked(list(of_engine.values()))
            found |= {name: by_id.get(job.id, UNKNOWN) for name, job in of_engine.items()}
    return found


def local_states(jobs: Sequence[Job]) -> dict[str, str]:
    """Of processes; those of other machines are unknown."""
    found = {}
    for job in jobs:
        host, _, pid = job.id.rpartition(":")
        if host == socket.gethostname():
            found[job.id] = RUNNING if _is_point(pid) else ENDED
    return found


def all_ended(jobs: Sequence[Job]) -> dict[str, str]:
    """Of processes, where the lock of their root is held: as long as one runs it holds the lock itself."""
    return {job.id: ENDED for job in jobs}


def _is_point(pid: str) -> bool:
    """Whether a process is there and, where that can be seen, no other that has got the same number since."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"sweep-point" in file.read()
    except OSError:
        return True


def run(command: Sequence[str], text: str | None = None) -> str:
    """What a program of an engine prints; `text` is its standard input.

    Raises:
      UserError: there is no such program.
      TrainingError: it failed; says what it said last, after printing what came before that.
    """
    done = _call(command, text)
    if done is None:
        raise UserError(
            f"there is no {command[0]} on this machine: start the sweep where there is one, or give another --engine"
        )
    if done.returncode:
        said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()] or ["without a word"]
        print(*said[-_SHOWN:-1], sep="\n", end="\n" if said[1:] else "", file=sys.stderr, flush=True)
        raise TrainingError(
            f"{shlex.join(command[:3])} ... ended with exit code {done.returncode}: {said[-1].strip():.300}"
        )
    return done.stdout


def ask(command: Sequence[str]) -> str | None:
    """What a program prints; None where it is missing or fails, as one that is asked about old jobs does."""
    done = _call(command)
    return None if done is None or done.returncode else done.stdout


def _call(command: Sequence[str], text: str | None = None) -> "subprocess.CompletedProcess[str] | None":
    """None where there is no such program. Without `text` it can ask nothing, which nobody would see."""
    try:
        return subprocess.run(
            command, input=text, stdin=subprocess.DEVNULL if text is None else None, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
