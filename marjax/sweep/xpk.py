"""Points as workloads of a GKE cluster, one `xpk workload create` each."""

import argparse
import re
import shlex
import uuid
from collections.abc import Sequence

from marjax.errors import UserError
from marjax.json_file import parse_json
from marjax.sweep import jobs
from marjax.sweep.jobs import ENDED, QUEUED, RUNNING, Job
from marjax.sweep.points import SweepRun

# Of `xpk workload create`, unless they are given. 42 and 127 to 255 are what marjax ends with where the same command
# goes on; a pod gets these seconds to save in; the cluster keeps what has ended for a week.
DEFAULTS = {
    "--max-restarts": "100",
    "--restart-on-exit-codes": "42,127-255",
    "--termination-grace-period-seconds": "300",
    "--ttl-seconds-after-finished": "604800",
}
NEEDED = ("--cluster", "--docker-image", "--tpu-type")
_JOBSET_LIST = {
    "items": [{"metadata": {"name": str}, "spec?": dict, "status?": {"conditions?": [{"type": str, "status": str}]}}]
}
_JOBSETS = "jobsets.jobset.x-k8s.io"


def check(arguments: Sequence[str]) -> None:
    """Raises UserError: arguments that xpk cannot do without are missing, or some that are made here are given."""
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    missing = [name for name in NEEDED if name not in given and not (name == "--tpu-type" and "--device-type" in given)]
    if missing:
        raise UserError(f'xpk needs {" ".join(missing)}: give them in --engine_args="{missing[0]}=... ..."')
    if own := sorted(given & {"--workload", "--command"}):
        raise UserError(f"{own[0]} is made for each point: leave it out of --engine_args")


def workload(name: str) -> str:
    """A new Kubernetes name after a point's: at most 40 of a-z, 0-9 and -.

    Another each time, since xpk would ask whether to delete a workload that has the name of the new one.
    """
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not re.match("[a-z]", words):
        words = f"p-{words}"
    return f"{words[:31].rstrip('-')}-{uuid.uuid4().hex[:8]}"


def submit(sweep_run: SweepRun, names: Sequence[str], *, arguments: Sequence[str]) -> dict[str, Job]:
    """Creates a workload for each point, and notes it.

    Args:
      sweep_run: of the sweep; its file is one of the image, by its path from the image's working directory.
      names: of the points.
      arguments: of `xpk workload create`, such as --cluster=x.

    Raises:
      UserError: there is no xpk.
      TrainingError: it refused; those before are submitted, and noted.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = [f"{name}={value}" for name, value in DEFAULTS.items() if name not in given]
    made = {}
    for name in names:
        id_ = workload(name)
        # `exec`, so that xpk's SIGTERM reaches the program and not a shell.
        command = f"exec {shlex.join(sweep_run.command(name, 'python'))}"
        with jobs.submitting(sweep_run, [name]):
            # Noted before: if this is killed meanwhile, the next start does not make a second one beside it.
            jobs.write(sweep_run, name, Job("xpk", id_))
            jobs.run(["xpk", "workload", "create", f"--workload={id_}", f"--command={command}", *defaults, *arguments])
        made[name] = Job("xpk", id_, _where(id_, arguments))
        jobs.write(sweep_run, name, made[name])
    return made


def _where(id_: str, arguments: Sequence[str]) -> tuple[str, ...]:
    """Arguments with which kubectl finds a workload that was just made: xpk has set its context to the cluster."""
    context = (jobs.ask(["kubectl", "config", "current-context"]) or "").strip()
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--namespace")
    space = options.parse_known_args(arguments)[0].namespace
    where = (f"--context={context}", *([f"--namespace={space}"] if space else []))
    return where if context and jobs.ask(["kubectl", "get", _JOBSETS, id_, "--output=name", *where]) else ()


def states(asked: Sequence[Job]) -> dict[str, str]:
    """Of workloads by name, as kubectl has them; none where there is no kubectl, or it does not know the cluster."""
    found: dict[str, str] = {}
    for where in dict.fromkeys(job.where for job in asked):
        text = jobs.ask(["kubectl", "get", _JOBSETS, "--output=json", *where])
        if text is None:
            continue
        if where:  # it was there, and is kept for a while after its end; else it may be of another cluster
            found |= {job.id: ENDED for job in asked if job.where == where}
        found |= _parse(text)
    return found


def _parse(text: str) -> dict[str, str]:
    try:
        items = parse_json(text, _JOBSET_LIST, where="kubectl's answer", advice="")["items"]
    except UserError:
        return {}
    found = {}
    for item in items:
        status = item.get("status", {})
        over = {
            condition.get("type") for condition in status.get("conditions", ()) if condition.get("status") == "True"
        } & {"Completed", "Failed"}
        found[item["metadata"]["name"]] = (
            ENDED if over or status.get("terminalState") else QUEUED if item.get("spec", {}).get("suspend") else RUNNING
        )
    return found
