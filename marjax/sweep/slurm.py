"""The Slurm engine: submits one array job, in which each task runs one point."""

import os
import re
import shlex
import sys
from collections.abc import Sequence

from marjax.errors import TrainingError
from marjax.storage import is_remote
from marjax.sweep import jobs
from marjax.sweep.jobs import ENDED, QUEUED, RUNNING, Job
from marjax.sweep.points import PREPARE, SweepRun

LARGEST = 1000  # tasks per array; Slurm's default MaxArraySize is 1001
RESTARTS = 10  # of a task whose processes were killed or lost each other; preempted tasks restart without limit

_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")


def submit(
    sweep_run: SweepRun, names: Sequence[str], *, prepare: bool, at_once: int | None, arguments: Sequence[str]
) -> dict[str, Job]:
    """Submits points and records their jobs.

    Args:
      sweep_run: the sweep; its root must be a folder that every node sees, or gs://.
      names: names of the points.
      prepare: whether the points depend on a job for `prepare`, which is submitted unless one is queued or running. If
        it fails, Slurm drops the points.
      at_once: maximum number of tasks of an array that run at a time; None for no limit.
      arguments: arguments for sbatch, such as --partition=x; they override those in the script.

    Raises:
      UserError: sbatch is not installed.
      TrainingError: sbatch failed.
    """
    after: list[str] = []
    if prepare:
        before = jobs.read(sweep_run, [PREPARE]).get(PREPARE)
        if before is None or states([before]).get(before.id) not in (QUEUED, RUNNING):
            before = _sbatch(sweep_run, [PREPARE], None, [*arguments, "--nodes=1", "--ntasks=1"])
            jobs.write(sweep_run, PREPARE, before)
        after = [f"--dependency=afterok:{before.id}", "--kill-on-invalid-dep=yes"]
    made = {}
    for first in range(0, len(names), LARGEST):
        part = names[first : first + LARGEST]
        array = _sbatch(sweep_run, part, at_once, [*arguments, *after])
        for task, name in enumerate(part):
            made[name] = Job("slurm", f"{array.id}_{task}", array.where)
            jobs.write(sweep_run, name, made[name])
    return made


def states(asked: Sequence[Job]) -> dict[str, str]:
    """Returns states by job id, from squeue or, for jobs that it has forgotten, from sacct."""
    found: dict[str, str] = {}
    for where in dict.fromkeys(job.where for job in asked):
        found |= _states([job.id for job in asked if job.where == where], where)
    return found


def _states(ids: Sequence[str], where: Sequence[str]) -> dict[str, str]:
    selection = f"--jobs={','.join(sorted({id_.partition('_')[0] for id_ in ids}))}"
    squeue = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", *where]
    listed = jobs.query([*squeue, selection])
    if listed is None:  # squeue fails if its only selected job is one that it has forgotten
        listed = jobs.query(squeue)
    found = _parse(listed or "", " ")
    if any(id_ not in found for id_ in ids):
        sacct = ["sacct", "--noheader", "--allocations", "--array", "--parsable2", "--format=JobID,State"]
        found = _parse(jobs.query([*sacct, selection, *where]) or "", "|") | found
        if listed is not None:  # squeue works, so unknown jobs have ended
            found |= {id_: ENDED for id_ in ids if id_ not in found}
    return found


def script(sweep_run: SweepRun, names: Sequence[str], at_once: int | None) -> str:
    """Returns the batch script of an array, or of a single job for PREPARE."""
    local = not is_remote(sweep_run.root)
    logs = os.path.abspath(sweep_run.root / "logs") if local else "."
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.splitext(os.path.basename(sweep_run.path))[0])
    single = list(names) == [PREPARE]
    throttle = f"%{at_once}" if at_once else ""
    options = [
        f"--job-name={stem}{PREPARE if single else ''}",
        f'--output="{_quoted(logs)}/slurm-%{"j" if single else "A_%a"}.log"',
        "--open-mode=append",
        "--requeue",
        "--signal=TERM@120",  # to the steps, which save before the time limit
        *([] if single else [f"--array=0-{len(names) - 1}{throttle}"]),
    ]
    command = sweep_run.command("", sys.executable)[:-1]
    # The first process to end gives the others time to save, or to notice the lost process.
    srun = "srun --kill-on-bad-exit=0 --wait=180"
    output = f' >> {shlex.quote(logs)}/"$name".log 2>&1' if local else ""
    kills = f'{shlex.quote(logs)}/slurm-"$id".kills'
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        f"names=({' '.join(shlex.quote(name) for name in names)})",
        'name="${names[${SLURM_ARRAY_TASK_ID:-0}]}"',
        "trap : TERM  # the steps get SIGTERM too, and need this script to wait while they save",
        f'{srun} {shlex.join(command)} "$name"{" --alone" if single else ""}{output}',
        "code=$?",
        "# 42: preempted after saving. 128 and above: killed, or a process of the run was lost. Not 127: a missing",
        "# command will be missing next time too.",
        'id="$SLURM_JOB_ID"; [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && id="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        "# A task that was cancelled, or that Slurm is about to requeue, is no longer running.",
        'if { [ "$code" -eq 42 ] || [ "$code" -ge 128 ]; } && '
        '[ "$(squeue --noheader --jobs="$id" --format=%T)" = RUNNING ]; then',
        f'    [ "$code" -eq 42 ] || echo "$code" >> {kills}  # Slurm\'s own count includes preemptions',
        f'    if [ "$code" -eq 42 ] || [ "$(wc -l < {kills})" -le {RESTARTS} ]; then',
        '        scontrol requeue "$id" && sleep 60  # requeuing ends this script',
        "    fi",
        "fi",
        f"rm -f {kills}",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _quoted(path: str) -> str:
    """Escapes a path for double quotes in an #SBATCH line, where % starts a job number."""
    return re.sub(r'(["\\\\])', r"\\\1", path).replace("%", "%%")


def _sbatch(sweep_run: SweepRun, names: Sequence[str], at_once: int | None, arguments: Sequence[str]) -> Job:
    """Submits a script, and returns its job; for an array, the array's."""
    text = script(sweep_run, names, at_once)
    with jobs.submitting(sweep_run, names):
        answer = jobs.run(["sbatch", "--parsable", *arguments], text).strip()
        id_, _, cluster = (answer.splitlines() or [""])[-1].partition(";")  # the cluster follows after --clusters
        if not id_.isdecimal():
            raise TrainingError(f"sbatch printed {answer!r:.200}, not a job id; check squeue before you try again")
    return Job("slurm", id_, (f"--clusters={cluster}",) if cluster else ())


def _parse(text: str, separator: str) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        id_, _, state = line.strip().partition(separator)
        word = state.split()[0].rstrip("+") if state.split() else ""  # "CANCELLED by 0"
        found[id_] = QUEUED if word in _QUEUED else RUNNING if word in _RUNNING else ENDED
    return found
