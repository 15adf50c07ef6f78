"""A Slurm cluster of one node on this machine, for tests: its own configuration, ports and folders, no root needed."""

import contextlib
import fcntl
import getpass
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping

import pytest
from support.processes import free_port

CPUS = 8  # that Slurm believes in

# Anybody may do anything: no passwords, no control groups. A requeued job may start as soon as the credential of its
# last start has expired: five seconds is the least, two minutes the default.
CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Submits jobs, looks at them, and waits for them."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str | os.PathLike[str], **settings: str) -> str:
        """What a program of Slurm prints; `settings` are environment variables. Raises CalledProcessError."""
        return subprocess.run(
            command, env={**self.environment, **settings}, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def submit(self, *arguments: str | os.PathLike[str], **settings: str) -> str:
        """sbatch with these arguments; the job's number."""
        return self.call("sbatch", "--parsable", *arguments, **settings).strip()

    def show(self, job: str) -> Mapping[str, str]:
        """The fields of `scontrol show job`, such as JobState."""
        fields = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, *states: str, seconds: float = 120.0) -> Mapping[str, str]:
        """The fields of a job that is in one of these states. Fails if it is not in time."""
        deadline = time.monotonic() + seconds
        while (fields := self.show(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {fields['JobState']} ({fields['Reason']}), not {states}"
            time.sleep(0.1)
        return fields


@contextlib.contextmanager
def slurm(folder: pathlib.Path) -> Iterator[Cluster]:
    """Starts a controller and a node, and ends them. Skips the test where Slurm is not installed.

    One at a time on a machine: the port of a job follows from its number, and every controller counts from 1.
    """
    with open(pathlib.Path(tempfile.gettempdir()) / f"marjax-slurm-{getpass.getuser()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _started(folder) as cluster:
            yield cluster


@contextlib.contextmanager
def _started(folder: pathlib.Path) -> Iterator[Cluster]:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    programs = {name: shutil.which(name, path=environment["PATH"]) for name in ("slurmctld", "slurmd", "sbatch")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            folder=folder, host="localhost", user=getpass.getuser(), cpus=CPUS, controller=free_port(), node=free_port()
        )
    )
    cluster = Cluster(folder)
    daemons = []
    try:
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            with open(folder / f"{command[0]}.out", "wb") as out:
                daemons.append(
                    subprocess.Popen(
                        [str(programs[command[0]]), *command[1:]],
                        env=cluster.environment,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                    )
                )
        deadline = time.monotonic() + 60
        while not _is_up(cluster):
            assert time.monotonic() < deadline and all(daemon.poll() is None for daemon in daemons), "\n".join(
                path.read_text() for path in sorted([*folder.glob("*.out"), *folder.glob("*.log")])
            )
            time.sleep(0.2)
        yield cluster
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            cluster.call("scancel", "--user", getpass.getuser())
            deadline = time.monotonic() + 20  # KillWait, and a little
            while cluster.call("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _is_up(cluster: Cluster) -> bool:
    with contextlib.suppress(subprocess.SubprocessError):
        return "idle" in cluster.call("sinfo", "--noheader", "--format=%t")
    return False
