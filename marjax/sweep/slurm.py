"""Points as Slurm jobs: one array of all that are to run, whose every task runs one point."""

import os
import re
import shlex
import sys
from collections.abc import Sequence

from marjax.errors import TrainingError
from marjax.storage import is_remote
from marjax.sweep import jobs
from marjax.sweep.jobs import ENDED, QUEUED, RUNNING, Job
from marjax.sweep.points import PREPARE, Plan

LARGEST = 1000  # tasks an array; Slurm's own MaxArraySize is 1001 unless a cluster sets another
RESTARTS = 10  # of a task whose processes were killed or lost each other; one that was preempted starts ever again

_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")


def submit(plan: Plan, names: Sequence[str], *, prepare: bool, at_once: int | None, arguments: Sequence[str],
           attempts: dict[str, int]) -> dict[str, Job]:
    """Submits points, after `prepare` if there is one, and notes their jobs.

    Args:
      plan: of the sweep; its root must be a folder that every node sees, or gs://.
      names: of the points.
      prepare: whether a job for `prepare` goes first; if that fails, Slurm drops the points.
      at_once: tasks of an array that may run at a time; None for no limit.
      arguments: of sbatch, such as --partition=x; they go before what the script says.
      attempts: how often each point was submitted, this time included.

    Raises:
      UserError: there is no sbatch.
      TrainingError: sbatch refused.
    """
    after: list[str] = []
    if prepare:
        id_ = _sbatch(plan, [PREPARE], None, [*arguments, "--nodes=1", "--ntasks=1"])
        after = [f"--dependency=afterok:{id_}", "--kill-on-invalid-dep=yes"]
    made = {}
    for first in range(0, len(names), LARGEST):
        part = names[first:first + LARGEST]
        id_ = _sbatch(plan, part, at_once, [*arguments, *after])
        for task, name in enumerate(part):
            made[name] = Job("slurm", f"{id_}_{task}", attempts[name])
            jobs.write(plan, name, made[name])
    return made


def states(asked: Sequence[Job]) -> dict[str, str]:
    """Of jobs by id, as squeue has them, and of those that it has forgotten, as the accounting does."""
    arrays = sorted({job.id.partition("_")[0] for job in asked})
    found: dict[str, str] = {}
    ask = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T"]
    # Of an array that it has forgotten squeue knows nothing, or fails; so each is asked about alone if need be.
    listed = jobs.ask([*ask, f"--jobs={','.join(arrays)}"])
    alone = listed is None and len(arrays) > 1
    texts = [jobs.ask([*ask, f"--jobs={array}"]) for array in arrays] if alone else [listed]
    for text in texts:
        found |= _parse(text or "", " ")
    if any(job.id not in found for job in asked):
        past = jobs.ask(["sacct", "--noheader", "--allocations", "--array", "--parsable2", "--format=JobID,State",
                         f"--jobs={','.join(arrays)}"])
        found = _parse(past or "", "|") | found
        if all(text is not None for text in texts):  # it answers, and does not know them: they are through
            found |= {job.id: ENDED for job in asked if job.id not in found}
    return found


def script(plan: Plan, names: Sequence[str], at_once: int | None) -> str:
    """The batch script of an array; of PREPARE alone, of a single job."""
    local = not is_remote(plan.root)
    logs = os.path.abspath(plan.root / "logs") if local else "."
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.splitext(os.path.basename(plan.path))[0])
    single = list(names) == [PREPARE]
    throttle = f"%{at_once}" if at_once else ""
    options = [f"--job-name={stem}{PREPARE if single else ''}",
               f"--output={logs}/slurm-%{'j' if single else 'A_%a'}.log",
               "--open-mode=append", "--requeue",
               "--signal=TERM@120",  # to the steps: before the time is up, they save
               *([] if single else [f"--array=0-{len(names) - 1}{throttle}"])]
    command = plan.command("", sys.executable)[:-1]
    # Whoever is first to end leaves the others time to end in order: to save, or to notice that a process is lost.
    srun = "srun --kill-on-bad-exit=0 --wait=180"
    told = f' >> {shlex.quote(logs)}/"$name".log 2>&1' if local else ""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options),
             f"cd {shlex.quote(os.getcwd())} || exit 1",
             f"names=({' '.join(shlex.quote(name) for name in names)})",
             'name="${names[${SLURM_ARRAY_TASK_ID:-0}]}"',
             "trap : TERM  # which the steps get too; if this script ended by it, they would not have time to save",
             f'{srun} {shlex.join(command)} "$name"{" --alone" if single else ""}{told}',
             "code=$?",
             "# 42: preempted, and saved. From 128 on: killed, or another process of the run was lost. Not 127: what",
             "# is not found will not be found the next time either.",
             'again=0; [ "$code" -eq 42 ] && again=1',
             f'[ "$code" -ge 128 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {RESTARTS} ] && again=1',
             'id="$SLURM_JOB_ID"; [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && id="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
             "# A task that was cancelled, or that Slurm itself is about to put back, is not running any more.",
             'if [ "$again" -eq 1 ] && [ "$(squeue --noheader --jobs="$id" --format=%T)" = RUNNING ]; then',
             '    scontrol requeue "$id" && sleep 60  # which ends this script',
             "fi",
             'exit "$code"']
    return "\n".join(lines) + "\n"


def _sbatch(plan: Plan, names: Sequence[str], at_once: int | None, arguments: Sequence[str]) -> str:
    """Submits a script, and returns the job's id."""
    text = script(plan, names, at_once)
    answer = jobs.run(["sbatch", "--parsable", *arguments], text).strip()
    id_ = answer.splitlines()[-1].partition(";")[0] if answer else ""  # ID or ID;CLUSTER
    if not id_.isdecimal():
        raise TrainingError(f"sbatch said {answer!r:.200}, which is no job's id: look with squeue before you try again")
    return id_


def _parse(text: str, separator: str) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        id_, _, state = line.strip().partition(separator)
        word = state.split()[0].rstrip("+") if state.split() else ""  # "CANCELLED by 0"
        found[id_] = QUEUED if word in _QUEUED else RUNNING if word in _RUNNING else ENDED
    return found
