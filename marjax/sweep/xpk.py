"""Points as workloads of a GKE cluster, one `xpk workload create` each."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence

from marjax.errors import UserError
from marjax.sweep import jobs
from marjax.sweep.jobs import ENDED, QUEUED, RUNNING, Job
from marjax.sweep.points import Plan

# Of `xpk workload create`, unless they are given. 42 and 127 to 255 are what marjax ends with where the same command
# goes on; a pod gets these seconds to save in.
DEFAULTS = {"--max-restarts": "100", "--restart-on-exit-codes": "42,127-255",
            "--termination-grace-period-seconds": "300"}
NEEDED = ("--cluster", "--docker-image", "--tpu-type")


def check(arguments: Sequence[str]) -> None:
    """Raises UserError: arguments that xpk cannot do without are missing, or some that are made here are given."""
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    missing = [name for name in NEEDED if name not in given and not (name == "--tpu-type" and "--device-type" in given)]
    if missing:
        raise UserError(f"xpk needs {' '.join(missing)}: give them in --engine_args=\"{missing[0]}=... ...\"")
    if own := sorted(given & {"--workload", "--command"}):
        raise UserError(f"{own[0]} is made for each point: leave it out of --engine_args")


def workload(plan: Plan, name: str, attempt: int = 1) -> str:
    """A Kubernetes name for a point: at most 40 of a-z, 0-9 and -; the same on every start, another for each root."""
    digest = hashlib.sha256(f"{os.fspath(plan.root)}\n{name}\n{attempt}".encode()).hexdigest()[:8]
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not re.match("[a-z]", words):
        words = f"p-{words}"
    return f"{words[:31].rstrip('-')}-{digest}"


def submit(plan: Plan, names: Sequence[str], *, arguments: Sequence[str], attempts: dict[str, int]) -> dict[str, Job]:
    """Creates a workload for each point, and notes it.

    Args:
      plan: of the sweep; its file is one of the image, by its path from the image's working directory.
      names: of the points.
      arguments: of `xpk workload create`, such as --cluster=x.
      attempts: how often each point was submitted, this time included: a name cannot be used again while the workload
        that has it is kept.

    Raises:
      UserError: there is no xpk.
      TrainingError: it refused; those before are submitted, and noted.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = [f"{name}={value}" for name, value in DEFAULTS.items() if name not in given]
    made = {}
    for name in names:
        id_ = workload(plan, name, attempts[name])
        # `exec`, so that xpk's SIGTERM reaches the program and not a shell.
        command = f"exec {shlex.join(plan.command(name, 'python'))}"
        jobs.run(["xpk", "workload", "create", f"--workload={id_}", f"--command={command}", *defaults, *arguments])
        made[name] = Job("xpk", id_, attempts[name])
        jobs.write(plan, name, made[name])
    return made


def states(asked: Sequence[Job]) -> dict[str, str]:
    """Of workloads by name, as kubectl has them in its current context; none where there is no kubectl."""
    text = jobs.ask(["kubectl", "get", "jobsets.jobset.x-k8s.io", "--output=json"])
    if text is None:
        return {}
    del asked
    found = {}  # what is not listed may be of another cluster than kubectl's, and is left unknown
    for item in json.loads(text)["items"]:
        status = item.get("status", {})
        over = {condition.get("type") for condition in status.get("conditions", ())
                if condition.get("status") == "True"} & {"Completed", "Failed"}
        found[item["metadata"]["name"]] = (ENDED if over or status.get("terminalState") else
                                           QUEUED if item.get("spec", {}).get("suspend") else RUNNING)
    return found
