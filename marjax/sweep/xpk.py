"""The xpk engine: runs each point as a workload of a GKE cluster, created by `xpk workload create`."""

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

# Default arguments of `xpk workload create`. marjax exits with 42 or 127 to 255 where the same command can resume; the
# grace period is for saving; the cluster keeps ended workloads for a week.
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
    """Raises UserError: arguments that xpk needs are missing, or ones that this engine sets are given."""
    given = _names(arguments)
    missing = [name for name in NEEDED if name not in given and not (name == "--tpu-type" and "--device-type" in given)]
    if missing:
        raise UserError(f'xpk needs {" ".join(missing)}; give --engine_args="{missing[0]}=... ..."')
    if own := sorted(given & {"--workload", "--command"}):
        raise UserError(f"{own[0]} is set for each point; omit it from --engine_args")


def _names(arguments: Sequence[str]) -> set[str]:
    return {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}


def workload(name: str) -> str:
    """Returns a new Kubernetes name for a point: at most 40 of a-z, 0-9 and -.

    It is unique: for an existing workload of the same name, xpk would ask whether to delete it.
    """
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not re.match("[a-z]", words):
        words = f"p-{words}"
    return f"{words[:31].rstrip('-')}-{uuid.uuid4().hex[:8]}"


def submit(sweep_run: SweepRun, names: Sequence[str], *, arguments: Sequence[str]) -> dict[str, Job]:
    """Creates a workload for each point, and records it.

    Args:
      sweep_run: the sweep; its file must be in the image, at the same path from the image's working directory.
      names: names of the points.
      arguments: arguments for `xpk workload create`, such as --cluster=x.

    Raises:
      UserError: xpk is not installed.
      TrainingError: xpk failed; earlier points are submitted and recorded.
    """
    given = _names(arguments)
    defaults = [f"{name}={value}" for name, value in DEFAULTS.items() if name not in given]
    made = {}
    for name in names:
        id_ = workload(name)
        # `exec`, so that xpk's SIGTERM reaches the program and not a shell.
        command = f"exec {shlex.join(sweep_run.command(name, 'python'))}"
        with jobs.submitting(sweep_run, [name]):
            # Recorded first: if this process is killed here, the next start does not create a second workload.
            jobs.write(sweep_run, name, Job("xpk", id_))
            jobs.run(["xpk", "workload", "create", f"--workload={id_}", f"--command={command}", *defaults, *arguments])
        made[name] = Job("xpk", id_, _where(id_, arguments))
        jobs.write(sweep_run, name, made[name])
    return made


def _where(id_: str, arguments: Sequence[str]) -> tuple[str, ...]:
    """Returns the kubectl arguments for a new workload's cluster, which xpk has made the current context."""
    context = (jobs.query(["kubectl", "config", "current-context"]) or "").strip()
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--namespace")
    space = options.parse_known_args(arguments)[0].namespace
    where = (f"--context={context}", *([f"--namespace={space}"] if space else []))
    return where if context and jobs.query(["kubectl", "get", _JOBSETS, id_, "--output=name", *where]) else ()


def states(asked: Sequence[Job]) -> dict[str, str]:
    """Returns states by workload name from kubectl; workloads of clusters that it cannot reach are left out."""
    found: dict[str, str] = {}
    for where in dict.fromkeys(job.where for job in asked):
        text = jobs.query(["kubectl", "get", _JOBSETS, "--output=json", *where])
        if text is None:
            continue
        if (
            where
        ):  # it existed in this cluster, which keeps ended workloads for a while; without where, it may be elsewhere
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
        true = {each.get("type") for each in status.get("conditions", ()) if each.get("status") == "True"}
        if true & {"Completed", "Failed"} or status.get("terminalState"):
            state = ENDED
        else:
            state = QUEUED if item.get("spec", {}).get("suspend") else RUNNING
        found[item["metadata"]["name"]] = state
    return found
