"""Jobs that run points: their engine and id, kept as files in the root folder, and their states.

The files suffice to find a job later: `marjax sweep --status` asks the engine of each job, if its program is installed.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from marjax.errors import TrainingError, UserError
from marjax.files import write_bytes
from marjax.json_file import read_json
from marjax.sweep.points import SweepRun, write_json

QUEUED, RUNNING, ENDED, UNKNOWN = "queued", "running", "ended", "unknown"
# Anyone may have written the file, and other options of squeue and kubectl can run programs.
_SHAPE = {
    "engine": {"local", "slurm", "xpk"},
    "id": re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,300}"),
    "where": [re.compile(r"--(clusters|context|namespace)=[^-\x00-\x1f][^\x00-\x1f]*")],
}
_SHOWN = 15  # lines of a failed command's output


@dataclasses.dataclass(frozen=True)
class Job:
    """The job that runs a point.

    Attributes:
      engine: "local", "slurm" or "xpk".
      id: "HOST:PID", Slurm's "ARRAY_TASK", or the name of the workload.
      where: arguments that select the job's cluster in Slurm's programs or kubectl, if needed.
    """

    engine: str
    id: str
    where: tuple[str, ...] = ()


def read(sweep_run: SweepRun, names: Sequence[str]) -> dict[str, Job]:
    """Returns the jobs of these points, without those that have none. Raises UserError: a damaged file."""
    jobs = {}
    for name in names:
        advice = "delete it if the job of that point has ended"
        found = read_json(sweep_run.job(name), _SHAPE, missing=None, advice=advice)
        if found is not None:
            jobs[name] = Job(found["engine"], found["id"], tuple(found["where"]))
    return jobs


def write(sweep_run: SweepRun, name: str, job: Job) -> None:
    """Records the job of a point, or of PREPARE. Raises UserError."""
    sweep_run.job(name).parent.mkdir(parents=True, exist_ok=True)
    write_json(sweep_run.job(name), dataclasses.asdict(job))


@contextlib.contextmanager
def submitting(sweep_run: SweepRun, names: Sequence[str]) -> Iterator[None]:
    """Removes the failure records of points before submission, since their jobs may fail at once.

    If the engine refuses, the records of failures and jobs are restored.
    """
    paths = [path for name in names for path in (sweep_run.failure(name), sweep_run.job(name))]
    before = {path: path.read_bytes() if path.exists() else None for path in paths}
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


def states(jobs: Mapping[str, Job], engines: Mapping[str, Callable[[Sequence[Job]], dict[str, str]]]) -> dict[str, str]:
    """Returns QUEUED, RUNNING, ENDED or UNKNOWN by point; `engines` maps each engine to its query by job."""
    found: dict[str, str] = {}
    for engine, states_by_id in engines.items():
        of_engine = {name: job for name, job in jobs.items() if job.engine == engine}
        if of_engine:
            by_id = states_by_id(list(of_engine.values()))
            found |= {name: by_id.get(job.id, UNKNOWN) for name, job in of_engine.items()}
    return found


def local_states(jobs: Sequence[Job]) -> dict[str, str]:
    """Returns the states of this machine's processes by id; those of other machines are unknown."""
    found = {}
    for job in jobs:
        host, _, pid = job.id.rpartition(":")
        if host == socket.gethostname():
            found[job.id] = RUNNING if _is_point(pid) else ENDED
    return found


def all_ended(jobs: Sequence[Job]) -> dict[str, str]:
    """States of processes while this process holds the root's lock, which every running point would hold."""
    return {job.id: ENDED for job in jobs}


def _is_point(pid: str) -> bool:
    """Whether the process exists and, where /proc can tell, has not been replaced by another with the same pid."""
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
    """Runs a program of an engine with `text` as standard input, and returns its output.

    Raises:
      UserError: the program is not installed.
      TrainingError: it failed; the error has the last line of its output, and the lines before it are printed.
    """
    done = _call(command, text)
    if done is None:
        raise UserError(
            f"{command[0]} is not installed on this machine; start the sweep where it is, or give another --engine"
        )
    if done.returncode:
        lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()] or ["no output"]
        print(*lines[-_SHOWN:-1], sep="\n", end="\n" if lines[1:] else "", file=sys.stderr, flush=True)
        raise TrainingError(
            f"{shlex.join(command[:3])} ... ended with exit code {done.returncode}: {lines[-1].strip():.300}"
        )
    return done.stdout


def query(command: Sequence[str]) -> str | None:
    """Returns a program's output; None if it is not installed or fails, for example when asked about old jobs."""
    done = _call(command)
    return None if done is None or done.returncode else done.stdout


def _call(command: Sequence[str], text: str | None = None) -> "subprocess.CompletedProcess[str] | None":
    """Returns None if there is no such program. Without `text`, standard input is empty: no hidden prompts."""
    try:
        return subprocess.run(
            command, input=text, stdin=subprocess.DEVNULL if text is None else None, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
