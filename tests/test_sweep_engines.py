"""Submitted sweeps: stand-ins for sbatch, squeue, sacct, xpk and kubectl record their arguments."""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import pytest
from support.paths import DIGITS

from marjax import cli
from marjax.errors import StorageError, TrainingError, UserError
from marjax.sweep import Point, engines, jobs, load, name_of, points, slurm, status, sweep, table, xpk
from marjax.sweep.jobs import Job
from marjax.sweep.points import PREPARE, SweepRun

FILE = f"""
CONFIG = {DIGITS + ":debug"!r}

def report(root, rows):
    (root / "report.txt").write_text(" ".join(row["status"] for row in rows))

def get_sweep():
    for lr in (1e-3, 2e-3):
        yield {{"train.lr": lr, "seed": 1}}
    yield "named", {{"train.steps": 40}}
"""
NAMES = ["lr=0.001,seed=1", "lr=0.002,seed=1", "named"]
PREPARES = FILE + '\ndef prepare(root):\n    (root / "prepared").write_text("yes")\n'


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that puts a stand-in on the PATH, which records its arguments and input and prints `answer`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name, answer="", code=0):
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"printed = sys.stdin.read() if {name == 'sbatch'} else ''\n"
            f"with open({str(folder / name)!r} + '.jsonl', 'a') as file:\n"
            f"    file.write(json.dumps([sys.argv[1:], printed]) + '\\n')\n"
            f"print({answer!r})\nsys.exit({code})\n"
        )
        path.chmod(0o755)

        def calls():
            calls_file = folder / f"{name}.jsonl"
            return [json.loads(line) for line in calls_file.read_text().splitlines()] if calls_file.exists() else []

        return calls

    for name in ("squeue", "sacct", "kubectl"):  # even if they are installed
        make(name, code=1)
    return make


def write(folder, text=FILE):
    path = folder / "sweep_file.py"
    path.write_text(text)
    return str(path)


def metrics(root, name, *steps):
    (root / name).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in steps]
    (root / name / "metrics.jsonl").write_text("".join(lines))


def finish(sweep_run, *names):
    for name in names:
        (sweep_run.root / name).mkdir(parents=True, exist_ok=True)
        sweep_run.finish(name, [], 300.0)


def test_get_sweep_may_yield(tmp_path):
    loaded = load(write(tmp_path))
    assert [point.name for point in loaded.points] == NAMES
    assert loaded.points[0] == Point(NAMES[0], f"{DIGITS}:debug", {"train.lr": 1e-3, "seed": 1})
    assert loaded.report is not None and loaded.prepare is None
    more = "from marjax.sweep import Point\n" + FILE + '    yield Point("own", "x.py")\n'
    assert load(write(tmp_path, more)).points[-1] == Point("own", "x.py")
    for text, match in (
        (FILE.replace("CONFIG =", "OTHER ="), "CONFIG"),
        (FILE + "    yield 3\n", "yielded 3"),
        ("def get_sweep():\n    return 3\n", "returned int"),
        (
            FILE + '    yield {"seed": 1, "train.lr": 1e-3}\n    yield {"train.lr": 0.001, "seed": 1}\n',
            "several points",
        ),
    ):
        with pytest.raises(UserError, match=match):
            load(write(tmp_path, text))


def test_names_of_overlays():
    assert name_of({"train.lr": 1e-3, "seed": 0}) == "lr=0.001,seed=0"
    assert name_of({"model.width": 8, "model.denoiser.width": 16}) == "model.width=8,model.denoiser.width=16"
    assert name_of({}) == "base"
    for odd in ({"data.source": "tfds:a/b"}, {"data.data_dir": "x" * 300}, {"seed": "é"}):
        name = name_of(odd)
        assert name == name_of(dict(odd)) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,199}", name)
    assert name_of({"data.source": "a:b"}) != name_of({"data.source": "a/b"})  # differ only in the hash


def test_invalid_arguments_start_nothing(tmp_path, capsys, programs):
    file, root = write(tmp_path), tmp_path / "root"
    programs("sbatch")
    for arguments, match in (
        (["--engine_args=--x=1"], "engine_args"),
        (["--engine", "slurm", "--engine_args='"], "engine_args"),
        (["--engine", "xpk"], "--cluster --docker-image --tpu-type"),
        (["--engine", "xpk", "--jobs", "2"], "jobs"),
        (["--engine", "xpk", "--engine_args=--cluster=c --docker-image=i --tpu-type=t --command=x"], "--command"),
        (["--status", "--engine", "slurm"], "--status"),
        (["--status"], str(root)),
    ):
        assert cli.main(["sweep", file, "--root", str(root), *arguments]) == 2
        assert match in capsys.readouterr().err
    with pytest.raises(UserError, match="root root"):
        sweep(file, "root", engine="xpk", engine_args="--cluster=c --docker-image=i --device-type=t")
    assert not root.exists()


def test_a_missing_program_and_one_that_refuses(tmp_path, programs, capfd):
    file, root = write(tmp_path), tmp_path / "root"
    os.environ["PATH"] = str(tmp_path / "bin")
    with pytest.raises(UserError, match="sbatch"):
        sweep(file, root, engine="slurm")
    sweep_run = SweepRun.open(file, root)
    sweep_run.fail("named", "ValueError: no", 2.0)
    for name, arguments in (
        ("sbatch", {"engine": "slurm"}),
        ("xpk", {"engine": "xpk", "engine_args": "--cluster=c --docker-image=i --tpu-type=t", "only": ["named"]}),
    ):
        programs(name, "\n".join(map(str, range(30))) + "\ninvalid\n[XPK] failed", code=1)
        capfd.readouterr()
        with pytest.raises(TrainingError, match=r"exit code 1: \[XPK\] failed$"):
            sweep(file, root, **arguments)
        assert capfd.readouterr().err == "".join(f"{k}\n" for k in range(17, 30)) + "invalid\n"
        assert not list((root / "jobs").glob("*"))  # so that the next start submits them all
        assert sweep_run.state("named").error == "ValueError: no"
    programs("sbatch", "submitted")
    with pytest.raises(TrainingError, match="sbatch.*submitted"):
        sweep(file, root, engine="slurm")
    assert not list((root / "jobs").glob("*"))
    programs("sbatch", "3")
    sweep(file, root, engine="slurm")
    assert sweep_run.state("named").status == "unfinished"


def test_programs_cannot_prompt():
    """xpk would wait for an answer to a hidden prompt."""
    terminal, write_end = os.pipe()
    os.write(write_end, b"y\n")
    before = os.dup(0)
    os.dup2(terminal, 0)
    try:
        assert jobs.run([sys.executable, "-c", "import sys; print(repr(sys.stdin.read()))"]) == "''\n"
    finally:
        os.dup2(before, 0)
        for descriptor in (before, terminal, write_end):
            os.close(descriptor)


def test_a_lost_peer_or_store_is_no_failure(tmp_path, monkeypatch):
    """The engine restarts all processes of the point; until then its state is unfinished, not failed."""
    sweep_run = SweepRun.open(write(tmp_path), tmp_path)
    (tmp_path / "logs").mkdir()

    def lose(sweep_run, name, start):
        assert sweep_run.state(name).status == "unfinished"
        raise raised[-1]

    monkeypatch.setattr(points, "_train_and_measure", lose)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    raised = []
    lost = RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
    for processes, error, status_ in (
        (2, lost, "unfinished"),
        (1, lost, "failed"),
        (1, StorageError("gs:// failed: Barrier"), "unfinished"),
    ):
        raised.append(error)
        monkeypatch.setattr(jax, "process_count", lambda processes=processes: processes)
        sweep_run.fail("named", "ValueError: no", 2.0)
        with pytest.raises(type(error), match="Barrier"):
            points.run_point(sweep_run.path, sweep_run.root, "named")
        assert sweep_run.state("named").status == status_


def test_local_points_of_a_deleted_container(tmp_path, monkeypatch):
    """If they ran, they would hold the lock. A lease in a bucket does not cover points."""
    file, root, started = write(tmp_path), tmp_path / "root", []
    jobs.write(SweepRun.open(file, root), "named", Job("local", "other:1"))
    monkeypatch.setattr(engines.runner, "run", lambda sweep_run, names, *_: started.append(names))
    sweep(file, root)
    monkeypatch.setattr(engines, "locked_folder", lambda *_: contextlib.nullcontext())
    with pytest.raises(TrainingError, match="1 of 3 points.*: named; "):
        sweep(file, root)
    assert started == [NAMES, NAMES[:2]]


def test_slurm_array(tmp_path, programs, capsys):
    file, root = write(tmp_path, PREPARES), tmp_path / "root"
    sbatch = programs("sbatch", "17;cluster")
    rows = sweep(file, root, engine="slurm", jobs=2, engine_args="--partition=x --comment='a b'")
    assert [row["status"] for row in rows] == ["unfinished"] * 3
    (first, prepare), (second, points) = sbatch()
    assert first == ["--parsable", "--partition=x", "--comment=a b", "--nodes=1", "--ntasks=1"]
    depends = ["--dependency=afterok:17", "--kill-on-invalid-dep=yes"]
    assert second == [*first[:3], *depends]
    assert "#SBATCH --array=0-2%2\n" in points and "--array" not in prepare and f"names=({PREPARE})" in prepare
    assert [jobs.read(SweepRun.open(file, root), NAMES)[name].id for name in NAMES] == ["17_0", "17_1", "17_2"]
    assert not (root / "report.txt").exists() and not (root / "prepared").exists()  # nothing has run

    # Queued, running and unknown jobs are left alone, including `prepare`. Ended ones are submitted again.
    squeue = programs("squeue", "17 RUNNING\n17_0 PENDING\n17_1 RUNNING\n17_2 PREEMPTED")
    programs("sbatch", "18")
    sweep(file, root, engine="slurm")
    assert "#SBATCH --array=0-0\n" in sbatch()[-1][1] and sbatch()[-1][0] == ["--parsable", *depends]
    assert len(sbatch()) == 3 and squeue()[-1][0][-2:] == ["--clusters=cluster", "--jobs=17"]
    assert jobs.read(SweepRun.open(file, root), NAMES)["named"] == Job("slurm", "18_0")
    programs("squeue", code=1)
    capsys.readouterr()
    with pytest.raises(TrainingError, match="3 of 3 points"):
        sweep(file, root, engine="slurm")
    assert len(sbatch()) == 3 and capsys.readouterr().out.count("is unknown") == 3
    programs("sacct", "17|COMPLETED\n17_0|COMPLETED\n17_1|CANCELLED by 0")
    sweep(file, root, engine="slurm", only=[NAMES[1]])
    assert sbatch()[-1][1].count(NAMES[1]) == 1 and len(sbatch()) == 5


def test_states_of_slurm_jobs(programs):
    asked = [Job("slurm", id_) for id_ in ("1_0", "1_1", "2_0", "3_0")]
    assert slurm.states(asked) == {}
    programs("squeue", "1_0 PENDING\n1_1 COMPLETING\n2_0 FAILED")
    assert slurm.states(asked) == {"1_0": "queued", "1_1": "running", "2_0": "ended", "3_0": "ended"}
    programs("sacct", "3_0|RUNNING\n2_0|RUNNING")  # the accounting lags behind
    assert slurm.states(asked)["3_0"] == "running" and slurm.states(asked)["2_0"] == "ended"
    programs("sacct", code=1)
    programs("squeue", "1_0 PENDING", code="'--jobs=3' in sys.argv")  # as for a job that it has forgotten
    assert slurm.states(asked[3:])["3_0"] == "ended"


@pytest.mark.parametrize(
    ("code", "kills", "state", "again"),
    [
        (0, 0, "RUNNING", False),
        (1, 0, "RUNNING", False),
        (2, 0, "RUNNING", False),
        (42, 99, "RUNNING", True),
        (127, 0, "RUNNING", False),
        (134, 0, "RUNNING", True),
        (137, slurm.RESTARTS - 1, "RUNNING", True),
        (137, slurm.RESTARTS, "RUNNING", False),
        (42, 0, "COMPLETING", False),
        (143, 0, "COMPLETING", False),
    ],
)
def test_the_script_of_an_array(tmp_path, programs, code, kills, state, again):
    """bash runs it with a stand-in for srun that exits with `code`; names contain shell syntax."""
    sweep_run = SweepRun.open(write(tmp_path), tmp_path / "the root")
    (sweep_run.root / "logs").mkdir(parents=True)
    srun, scontrol = programs("srun", "step 1", code), programs("scontrol")
    programs("sleep")
    squeue = programs("squeue", state)
    text = slurm.script(sweep_run, NAMES, None)
    environment = os.environ | {
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_JOB_ID": "8",
        "SLURM_RESTART_COUNT": "99",
    }  # mostly preemptions
    killed = sweep_run.root / "logs" / "slurm-7_1.kills"
    if kills:
        killed.write_text("137\n" * kills)
    assert subprocess.run(["bash"], input=text, text=True, env=environment).returncode == code
    ((arguments, _),) = srun()
    assert all(call[1] == "--jobs=7_1" for call, _ in squeue())
    assert arguments == [
        "--kill-on-bad-exit=0",
        "--wait=180",
        sys.executable,
        "-P",
        "-m",
        "marjax",
        "sweep-point",
        sweep_run.path,
        "--root",
        str(tmp_path / "the root"),
        "--name",
        NAMES[1],
    ]
    assert [call for call, _ in scontrol()] == ([["requeue", "7_1"]] if again else [])
    assert not killed.exists()
    assert (sweep_run.root / "logs" / f"{NAMES[1]}.log").read_text() == "step 1\n"
    assert all(line.startswith("#SBATCH --") for line in text.splitlines()[1:6])


def test_xpk_workloads(tmp_path, programs):
    file, root = write(tmp_path), str(tmp_path / "mount")
    xpk_calls = programs("xpk")
    arguments = "--cluster=c --docker-image=image:1 --tpu-type=v5litepod-16 --max-restarts=3"
    sweep(file, root, engine="xpk", engine_args=arguments)
    calls = [dict(each.removeprefix("--").split("=", 1) for each in call[2:]) for call, _ in xpk_calls()]
    assert all(call[:2] == ["workload", "create"] for call, _ in xpk_calls())
    sweep_run = SweepRun.open(file, root)
    names = [call["workload"] for call in calls]
    assert [name[:-9] for name in names] == ["lr-0-001-seed-1", "lr-0-002-seed-1", "named"]
    assert jobs.read(sweep_run, NAMES) == {point: Job("xpk", name) for point, name in zip(NAMES, names, strict=True)}
    assert [call["command"] for call in calls] == [
        f"exec python -P -m marjax sweep-point {file} --root {root} --name {name}" for name in NAMES
    ]
    assert calls[0]["max-restarts"] == "3" and "42" in calls[0]["restart-on-exit-codes"]
    assert calls[0]["ttl-seconds-after-finished"] == "604800"

    # Kueue suspends queued workloads. A failed one is resubmitted under a new name, since the old one still exists.
    items = [
        {"metadata": {"name": names[0]}, "spec": {"suspend": True}},
        {"metadata": {"name": names[1]}, "spec": {}},
        {"metadata": {"name": names[2]}, "status": {"conditions": [{"type": "Failed", "status": "True"}]}},
    ]
    programs("kubectl", json.dumps({"items": items}))
    lines = status(file, root)
    assert [line.split()[1] for line in lines] == ["queued", "running", "unfinished"]
    sweep_run.job("named").unlink()
    sweep(file, root, engine="xpk", engine_args=arguments)
    again = jobs.read(sweep_run, NAMES)["named"].id
    assert len(xpk_calls()) == 4 and again != names[2] and f"--workload={again}" in xpk_calls()[-1][0]


def test_workloads_of_a_known_cluster(programs):
    """The cluster is known if kubectl found the new workload in xpk's context. A missing workload has ended."""
    kubectl = programs("kubectl", "cluster")
    where = xpk._where("a-1", ["--tpu-type=t", "--namespace", "n"])
    assert where == ("--context=cluster", "--namespace=n") and set(where) | {"a-1"} <= set(kubectl()[-1][0])
    assert xpk._where("a-1", []) == ("--context=cluster",)
    kubectl = programs("kubectl", json.dumps({"items": [{"metadata": {"name": "a-2"}, "spec": {}}]}))
    asked = [Job("xpk", "a-1", where), Job("xpk", "a-2", where), Job("xpk", "b-1")]
    assert xpk.states(asked) == {"a-1": "ended", "a-2": "running"}
    assert set(where) <= set(kubectl()[-2][0]) and not set(where) & set(kubectl()[-1][0])


def test_names_of_workloads():
    points = ["lr=0.001,seed=1", "lr=0.001,seed=10", "9", "A" * 200, "A" * 199, "_prepare", "x-" * 15 + "y,z"]
    names = [xpk.workload(name) for name in points * 2]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name) for name in names)


def test_status_of_all_kinds(tmp_path, programs):
    file, root = write(tmp_path, PREPARES), tmp_path / "root"
    sweep_run = SweepRun.open(file, root)
    (sweep_run.root / "logs").mkdir(parents=True)
    assert [line.split(maxsplit=1)[1] for line in status(file, root)] == ["unfinished"] * 3
    metrics(root, NAMES[0], 10, 20)
    old = time.time() - 7200
    os.utime(root / NAMES[0] / "metrics.jsonl", (old, old))
    metrics(root, "named", 5)
    finish(sweep_run, NAMES[1])
    sweep_run.fail("named", "ValueError: no", 2.0)
    jobs.write(sweep_run, NAMES[0], Job("slurm", "5_0"))
    read = [line.split(maxsplit=1)[1] for line in status(file, root)]
    assert [re.sub("updated [0-9]+ s ", "updated now ", line) for line in read] == [
        "submitted (slurm 5_0, state unknown here), step 20 of 20, updated 2 h ago",
        "done in 5 min",
        "failed: ValueError: no, step 5 of 40, updated now ago",
    ]
    programs("squeue", "5_0 RUNNING")
    assert status(file, root)[0].split(maxsplit=1)[1] == "running (slurm 5_0), step 20 of 20, updated 2 h ago"
    programs("squeue")
    sweep_run.fail(PREPARE, "no", 1.0)
    assert status(file, root)[0].endswith("updated 2 h ago; prepare failed: no")


def test_local_processes_are_known(tmp_path):
    host = socket.gethostname()
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)", "sweep-point"], stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()  # before that, /proc shows the parent's command line
        asked = [Job("local", f"{host}:{process.pid}"), Job("local", f"{host}:{os.getpid()}"), Job("local", "other:1")]
        assert jobs.local_states(asked) == {asked[0].id: "running", asked[1].id: "ended"}  # not a point
    finally:
        process.kill()
        process.communicate()
    assert jobs.local_states(asked[:1]) == {asked[0].id: "ended"}


def test_report_waits_for_the_last(tmp_path, programs):
    file, root = write(tmp_path), tmp_path / "root"
    programs("sbatch", "3")
    sweep_run = SweepRun.open(file, root)
    sweep(file, root, engine="slurm")
    programs("squeue", "3_0 COMPLETED\n3_1 COMPLETED\n3_2 RUNNING")
    finish(sweep_run, *NAMES[:2])
    sweep(file, root, engine="slurm")
    assert not (root / "report.txt").exists()
    finish(sweep_run, "named")
    sweep(file, root, engine="slurm")
    assert pathlib.Path(root / "report.txt").read_text() == "done done done"


DAMAGED = ["", "[]", "{}", "[" * 100_000, "\0", '{"engine": 9}', '{"rows": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_records_of_a_point_are_named(tmp_path, capsys, text):
    """A point with a damaged result runs again. A damaged job file is an error, since that job may still run."""
    file, root = write(tmp_path), tmp_path / "root"
    sweep_run = SweepRun.open(file, root)
    finish(sweep_run, *NAMES[:2])
    for path in (root / NAMES[1] / "result.json", sweep_run.failure("named")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert [row["status"] for row in table(file, root)] == ["done", "unfinished", "unfinished"]
    printed = capsys.readouterr().err
    assert "result.json" in printed and "named.failed.json" in printed
    jobs.write(sweep_run, "named", Job("local", "other:1"))
    sweep_run.job("named").write_text(text)
    for act in (status, sweep):
        with pytest.raises(UserError, match=r"jobs/named\.json"):
            act(file, root)


@pytest.mark.parametrize(
    "changes",
    [
        {"where": ["--kubeconfig=/tmp/x"]},
        {"where": ["-o", "x"]},
        {"where": ["--context=-x"]},
        {"where": "--context=x"},
        {"id": "--kubeconfig=/tmp/x"},
        {"id": 3},
        {"id": "a\n"},
        {"engine": "other"},
        {"engine": ["slurm"]},
    ],
)
def test_a_job_file_cannot_add_options(tmp_path, programs, changes):
    """kubectl runs programs named in a --kubeconfig, and the root of a sweep is not trusted."""
    file, root = write(tmp_path), tmp_path / "root"
    calls = [programs("kubectl", "{}"), programs("squeue")]
    sweep_run = SweepRun.open(file, root)
    jobs.write(sweep_run, "named", Job("xpk", "a-1", ("--context=gke_a_b_c",)))
    fields = json.loads(sweep_run.job("named").read_text())
    sweep_run.job("named").write_text(json.dumps(fields | changes))
    with pytest.raises(UserError, match=r"jobs/named\.json"):
        status(file, root)
    assert not [each() for each in calls if each()]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"items": [{}]}', '{"items": [{"metadata": {"name": "a"}, "status": 3}]}']
)
def test_an_invalid_answer_of_kubectl(programs, text):
    programs("kubectl", text)
    assert jobs.states({"p": Job("xpk", "a")}, {"xpk": xpk.states}) == {"p": "unknown"}


def test_a_surrogate_in_a_result_can_be_written_again(tmp_path):
    file, root = write(tmp_path), tmp_path / "root"
    sweep_run = SweepRun.open(file, root)
    (sweep_run.root / "logs").mkdir(parents=True)
    sweep_run.fail("named", "no file a\udcff", 1.0)
    assert table(file, root)[-1]["error"] == "no file a\udcff"
    assert b"a\xff" in (root / "table.csv").read_bytes()
