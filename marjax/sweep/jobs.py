"""Jobs that were given points: which engine has them under what id, as files in the root folder, and how they are.

The files are all that is needed later: `marjax sweep --status` asks the engine of each job, where its program is there.
"""

import dataclasses
import os
import shlex
import socket
import subprocess
from collections.abc import Callable, Sequence

from etils import epath

from marjax.errors import TrainingError, UserError
from marjax.sweep.points import Plan, read_json, write_json

QUEUED, RUNNING, ENDED, UNKNOWN = "queued", "running", "ended", "unknown"


@dataclasses.dataclass(frozen=True)
class Job:
    """What runs a point.

    Attributes:
      engine: "local", "slurm" or "xpk".
      id: "HOST:PID", Slurm's "ARRAY_TASK", or the workload's name.
      attempt: how often the point was submitted, from 1 on.
      where: what an engine needs besides to find it; of xpk the cluster's arguments.
    """

    engine: str
    id: str
    attempt: int = 1
    where: tuple[str, ...] = ()


def read(plan: Plan, names: Sequence[str]) -> dict[str, Job]:
    """The jobs of these points; those that none was given are left out."""
    jobs = {}
    for name in names:
        found = read_json(plan.job(name))
        if found is not None:
            jobs[name] = Job(found["engine"], found["id"], found["attempt"], tuple(found["where"]))
    return jobs


def write(plan: Plan, name: str, job: Job) -> None:
    """Notes a point's job. Raises UserError."""
    make_folder(plan.job(name).parent)
    write_json(plan.job(name), dataclasses.asdict(job))


def make_folder(folder: epath.Path) -> None:
    """Makes a folder in the root. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror or error}): give another --root") from None


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


def _is_point(pid: str) -> bool:
    """Whether a process is there and, where that can be seen, no other that has got the same number since."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
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
      TrainingError: it failed; says what it said last.
    """
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on this machine: start the sweep where there is one, or give "
                        f"another --engine") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "without a word").splitlines()[-1]
        raise TrainingError(f"{shlex.join(command[:3])} ... ended with exit code {done.returncode}: {said:.300}")
    return done.stdout


def ask(command: Sequence[str]) -> str | None:
    """What a program prints; None where it is missing or fails, as one that is asked about old jobs does."""
    try:
        return run(command)
    except (UserError, TrainingError):
        return None
