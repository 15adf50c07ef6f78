"""launch/slurm.sbatch and the arrays of sweeps on a real Slurm: who is told to stop, and what is queued again."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
from support.configs import QUICK, flags, make_digits
from support.paths import DIGITS, ROOT
from support.slurm import slurm

from marjax import train
from marjax.errors import LOST_PEER, PREEMPTED
from marjax.sweep import slurm as engine
from marjax.sweep.jobs import ENDED, Job
from marjax.sweep.points import SweepRun

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "launch" / "slurm.sbatch"
STEPS = 12
LARGE = {"train__batch_size": 1024, "train__accumulate": 4}  # so that the signal comes before the last step
ODD = ["--config", "configs/x.py:model=mar_base,variant=ar", "a b", "$HOME `id` *", 'it\'s "quoted"', ""]

# Ends as its first argument says, one word a start, "wait" until SIGTERM; then the second process takes longer to save.
# "kill": the second is killed, which the first notices a little later; "slip": it has made a slip, likewise.
TASK = f"""
import json, os, signal, sys, time
start, me = int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ["SLURM_PROCID"])
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(me), print("saved", start), sys.exit({PREEMPTED})))
print("start", start, json.dumps(sys.argv[2:]), flush=True)
ends = sys.argv[1].split(",")
end = ends[min(start, len(ends) - 1)]
if end == "wait":
    time.sleep(600)
if end == "kill" and me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if end == "slip" and me == 1:
    sys.exit(2)
if end in ("kill", "slip"):
    time.sleep(1)
    print("noticed", start)
    sys.exit({LOST_PEER})
sys.exit(int(end))
"""


# Of the points of a sweep: the state of each at last, how often it was started again, and what it has printed then.
ENDS = {
    "wait,0": ("COMPLETED", "1", {"saved 0": 2, "start 1": 2}),
    "wait,0,0": ("CANCELLED", "0", {"saved 0": 2, "start 1": 0}),
    "kill,0": ("COMPLETED", "1", {"noticed 0": 1, "start 1": 2}),
    "42,kill,0": ("COMPLETED", "2", {"noticed 1": 1, "start 2": 2}),
    "2,0": ("FAILED", "0", {"start 1": 0}),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.task = cluster.folder / "task.py"
        cluster.task.write_text(TASK)
        yield cluster


@pytest.fixture(scope="module")
def array(cluster):
    """The root of a sweep whose points are named after how their starts end, and the job of each."""
    file, root = cluster.folder / "sweep_file.py", cluster.folder / "a sweep"
    file.write_text(f"def get_sweep():\n    yield 'unused', {{}}\nCONFIG = {DIGITS + ':debug'!r}\n")
    (root / "logs").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        patch.setattr(SweepRun, "command", lambda *_: [sys.executable, str(cluster.task), ""])
        patch.setattr(engine, "RESTARTS", 1)
        made = engine.submit(
            SweepRun.open(str(file), root), list(ENDS), prepare=False, at_once=None, arguments=["--ntasks=2"]
        )
        states = engine.states([*made.values(), Job("slurm", "999_0")])
        assert {id_ for id_, state in states.items() if state == ENDED} == {"999_0"}
        assert engine.states([Job("slurm", "999_0")])["999_0"] == ENDED  # of which alone squeue says that it is invalid
    for name in ("wait,0", "wait,0,0"):
        log_of(cluster, f"a sweep/logs/{name}", until="start 0", count=2)
    cluster.call("scancel", "--signal=TERM", made["wait,0"].id)  # as Slurm does before its time is up
    cluster.call("scancel", made["wait,0,0"].id)
    return {name: job.id for name, job in made.items()}


@pytest.fixture(scope="module")
def jobs(cluster, array):
    """The numbers of all jobs by name, of two processes each. They run beside those of `array`, and mostly wait.

    "run" is marjax itself, with two CPU devices a process. It and "stopped" have got SIGTERM, and "cancelled" was
    cancelled.
    """

    def submit(name, *command, **settings):
        return cluster.submit(
            "--ntasks=2",
            f"--job-name={name}",
            f"--output={cluster.folder}/{name}.log",
            f"--chdir={cluster.folder}",
            SCRIPT,
            *command,
            **settings,
        )

    ends = {
        "stopped": "wait,0",
        "killed": "kill,42,0",
        "hopeless": "42",
        "cancelled": "wait,0",
        "slip": "2,0",
        "done": "0,1",
        "absent": "127,0",
        "uneven": "slip",
    }
    numbers = {
        name: submit(
            name,
            sys.executable,
            cluster.task,
            end,
            *ODD,
            MAX_RESTARTS="1" if name == "hopeless" else "100",
            MAX_KILLS="1",
        )
        for name, end in ends.items()
    }
    for name in ("stopped", "cancelled"):
        for index in range(2):
            log_of(cluster, name, until=f"{index}: start 0")
    stop(cluster, numbers["stopped"])
    cluster.call("scancel", numbers["cancelled"])
    numbers["run"] = submit(
        "run",
        sys.executable,
        "-m",
        "marjax",
        "train",
        "--config",
        f"{DIGITS}:debug",
        "--workdir",
        cluster.folder / "run",
        f"--config.train.steps={STEPS}",
        "--config.train.warmup_steps=1",
        "--config.checkpoint.every=1000",
        "--config.log.every=1",
        "--config.log.samples_every=0",
        "--config.log.tensorboard=false",
        "--config.log.progress=false",
        *flags(QUICK | LARGE),
        JAX_NUM_CPU_DEVICES="2",
    )
    log_of(cluster, "run", until="2 processes, 4 devices")  # connected; the step is compiled next
    stop(cluster, numbers["run"])
    return numbers


def log_of(cluster, name, until="", count=1):
    """What a job has printed, once that contains `until` so often."""
    file = cluster.folder / f"{name}.log"
    deadline = time.monotonic() + 120
    while not file.exists() or file.read_text().count(until) < count:
        assert time.monotonic() < deadline, f"no {until!r} in {file.read_text() if file.exists() else file}"
        time.sleep(0.05)
    return file.read_text()


def stop(cluster, job):
    """As Slurm does before the time is up: the script alone gets SIGTERM."""
    cluster.call("scancel", "--batch", "--signal=TERM", job)


def test_a_preempted_run_goes_on_from_where_it_was(cluster, jobs, tmp_path):
    """No checkpoint is due before the end, so that what the second start goes on from was saved on SIGTERM."""
    fields = cluster.wait(jobs["run"], "COMPLETED", "FAILED", "CANCELLED", seconds=240)
    log = log_of(cluster, "run")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert f"ended with {PREEMPTED}" in log and "resuming at step" in log
    rows = [json.loads(line) for line in (cluster.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    train(make_digits(train__steps=STEPS, checkpoint__every=1000, **QUICK | LARGE), tmp_path / "alone")
    alone = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    # Four devices add up in another order than one. A step too few or too many is another matter.
    ours, theirs = ([row["train/loss"] for row in each] for each in (rows, alone))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert np.abs(np.diff(theirs)).min() > 1e-2


def test_sigterm_lets_all_processes_save_and_the_job_goes_back_into_the_queue(cluster, jobs):
    fields = cluster.wait(jobs["stopped"], "COMPLETED", "FAILED")
    log = log_of(cluster, "stopped")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    for index in range(2):
        assert f"{index}: saved 0" in log and f"{index}: start 1" in log
    assert log.count(json.dumps(ODD)) == 4  # every process of every start got them as they are; and one log has both


def test_cancelling_lets_all_processes_save_and_ends_the_job(cluster, jobs):
    log = log_of(cluster, "cancelled", until=f"ended with {PREEMPTED}")
    assert "0: saved 0" in log and "1: saved 0" in log
    assert cluster.wait(jobs["cancelled"], "CANCELLED", "PENDING")["JobState"] == "CANCELLED"


def test_a_lost_process_restarts_the_job(cluster, jobs):
    fields = cluster.wait(jobs["killed"], "COMPLETED", "FAILED")
    log = log_of(cluster, "killed")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "2"), log  # a preemption counts by itself
    assert f"ended with {128 + signal.SIGKILL}" in log
    assert "0: noticed 0" in log  # it was left to notice, not killed at once
    assert not (cluster.folder / f"marjax-{jobs['killed']}.kills").exists()


def test_restarts_have_an_end(cluster, jobs):
    fields = cluster.wait(jobs["hopeless"], "COMPLETED", "FAILED")
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "1", f"{PREEMPTED}:0")


def test_a_slip_of_one_process_is_not_tried_without_end(cluster, jobs):
    """The other has lost it, which is what srun tells."""
    fields = cluster.wait(jobs["uneven"], "COMPLETED", "FAILED")
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "1", f"{LOST_PEER}:0")
    assert "given up: processes were killed or lost 2 times" in log_of(cluster, "uneven")
    assert not (cluster.folder / f"marjax-{jobs['uneven']}.kills").exists()


@pytest.mark.parametrize(
    ("name", "state", "code"), [("slip", "FAILED", 2), ("done", "COMPLETED", 0), ("absent", "FAILED", 127)]
)
def test_other_ends_are_final(cluster, jobs, name, state, code):
    fields = cluster.wait(jobs[name], "COMPLETED", "FAILED")
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == (state, "0", f"{code}:0")


@pytest.mark.parametrize("name", ENDS)
def test_points_of_a_sweep(cluster, array, name):
    """The first that is through lets the others of its point save, or notice; no point ends or restarts another."""
    state, restarts, printed = ENDS[name]
    fields = cluster.wait(array[name], "COMPLETED", "FAILED", "CANCELLED")
    log = log_of(cluster, f"a sweep/logs/{name}")
    assert (fields["JobState"], fields["Restarts"]) == (state, restarts), log
    assert {text: log.count(text) for text in printed} == printed
    assert (cluster.folder / "a sweep" / "logs" / f"slurm-{array[name]}.log").exists()


def test_slurm_would_stop_it_before_its_time_is_up(cluster):
    """The options in the script, as Slurm understands them."""
    job = cluster.submit("--hold", "--ntasks=1", f"--output={cluster.folder}/held.log", SCRIPT, "true")
    fields = cluster.show(job)
    assert fields["Requeue"] == "1" and fields["JobName"] == "marjax"
    script = cluster.call("scontrol", "write", "batch_script", job, "-")
    assert script == SCRIPT.read_text()
    cluster.call("scancel", job)


def test_a_command_is_needed(cluster):
    job = cluster.submit(f"--output={cluster.folder}/empty.log", SCRIPT)
    assert cluster.wait(job, "COMPLETED", "FAILED")["ExitCode"] == "2:0"
    assert "launch/slurm.sbatch: error: no command" in log_of(cluster, "empty")
    assert os.access(SCRIPT, os.X_OK)
