"""Sweeps: names, grids and tables without processes; then a small sweep that fails and resumes."""

import contextlib
import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support.configs import QUICK, dotted, make_digits
from support.paths import DIGITS

from marjax import cli
from marjax import config as config_lib
from marjax.errors import UserError
from marjax.sweep import Point, Sweep, grid, runner, select, sweep, table
from marjax.sweep.points import SweepRun, checked, fingerprint
from marjax.sweep.rows import columns, to_csv, to_markdown

SMALL = {
    "train.steps": 2,
    "train.warmup_steps": 1,
    "checkpoint.every": 2,
    "log.every": 1,
    "log.samples_every": 0,
    "log.tensorboard": False,
    "log.progress": False,
    **dotted(QUICK),
}

FILE = f"""
from marjax.sweep import Point, Sweep

SMALL = {SMALL!r}

def measure(workdir, root):
    import jax
    assert (root / "prepared").read_text() == "yes"
    print("measuring", workdir.name)
    if workdir.name == "bad" and not (root / "mended").exists():
        raise ValueError("no\\nluck")
    return [{{"weights": name, "score": jax.numpy.float32(1 / 3).item() + k}} for k, name in enumerate(("raw", "ema"))]

def prepare(root):
    (root / "prepared").write_text("yes")

def report(root, rows):
    (root / "report.txt").write_text(" ".join(row["status"] for row in rows))

def get_sweep():
    return Sweep([Point("good", {DIGITS + ":debug"!r}, SMALL), Point("bad", {DIGITS + ":debug"!r}, SMALL | EXTRA)],
                 measure, prepare, report)
"""


def write(folder, extra, text=FILE):
    path = folder / "sweep_file.py"
    path.write_text(text.replace("EXTRA", repr(extra)))
    return str(path)


def test_grid_names():
    assert grid({"train.lr": [1e-3, 2e-3], "seed": [0, 1]}) == {
        "lr=0.001,seed=0": {"train.lr": 1e-3, "seed": 0},
        "lr=0.001,seed=1": {"train.lr": 1e-3, "seed": 1},
        "lr=0.002,seed=0": {"train.lr": 2e-3, "seed": 0},
        "lr=0.002,seed=1": {"train.lr": 2e-3, "seed": 1},
    }
    assert list(grid({"model.width": [8], "model.denoiser.width": [16]})) == ["model.width=8,model.denoiser.width=16"]
    for axes, names in (({"data.source": ["tfds:a/b"]}, "source=tfds:a/b"), ({"seed": [1, 1]}, "seed=1")):
        with pytest.raises(UserError, match=names):
            grid(axes)


def test_names_of_points():
    Sweep([Point("a.b=1,c=-2e+3", "x.py")])
    for names in (["a", "b", "a"], ["a", "A"]):
        with pytest.raises(UserError, match="several points"):
            Sweep([Point(name, "x.py") for name in names])
    for name in ("", "a/b", "..", ".a", "_prepare", "a b", "-a", "logs", "Table.csv", "a" * 201, "a\n"):
        with pytest.raises(UserError, match="letters, digits"):
            Sweep([Point(name, "x.py")])
    with pytest.raises(UserError, match="no points"):
        Sweep([])


def test_select():
    names = ["lr=1,seed=0", "lr=1,seed=1", "c"]
    assert select("c,lr=1,seed=1", names) == ["lr=1,seed=1", "c"]
    assert select(["c"], names) == ["c"]
    for only, match in (("lr=1,seed=2", "lr=1.*lr=1,seed="), ("zzz", "zzz.*lr=1,seed=0"), ([], "no points")):
        with pytest.raises(UserError, match=match):
            select(only, names)


def test_table_text():
    rows = [
        {"point": "a", "train.lr": 1e-3, "step": 2, "train/loss": 1.23456789, "fid": 10.0, "status": "done"},
        {"point": "b|c", "train.lr": 2e-3, "status": "failed", "error": 'two\nlines, "quoted"'},
    ]
    names = columns(rows, ["train.lr"])
    assert names == ["point", "train.lr", "step", "train/loss", "fid", "status", "error"]
    assert to_markdown(rows, names) == (
        "| point | train.lr | step | train/loss | fid | status | error |\n"
        "| --- | ---: | ---: | ---: | ---: | --- | --- |\n"
        "| a | 0.001 | 2 | 1.235 | 10 | done |  |\n"
        '| b\\|c | 0.002 |  |  |  | failed | two lines, "quoted" |\n'
    )
    read = list(csv.DictReader(to_csv(rows, names).splitlines(keepends=True)))
    assert read[0]["train/loss"] == "1.23456789" and read[1]["error"] == rows[1]["error"] and read[1]["fid"] == ""


def test_measured_rows_are_checked():
    assert checked([{"a": np.float32(0.5), "b": np.int64(2), "c": "x"}]) == [{"a": 0.5, "b": 2, "c": "x"}]
    assert type(checked([{"b": np.int64(2)}])[0]["b"]) is int
    for wrong, match in (
        (None, "None"),
        ({"a": 1}, "'a'"),
        ([{"status": 1}], "'status'"),
        ([{"seed": 1}], "'seed'"),
        ([{"a": np.zeros(2)}], "a="),
        ([{"a": None}], "a=None"),
    ):
        with pytest.raises(UserError, match=match):
            checked(wrong, ["seed"])


def test_fingerprint_knows_what_counts():
    config = config_lib.resolve(make_digits())
    assert fingerprint(config) == fingerprint(config_lib.resolve(make_digits(log__every=3)))
    for other in ({"seed": 1}, {"sample__cfg": 1.5}, {"train__steps": 5}):
        assert fingerprint(config) != fingerprint(config_lib.resolve(make_digits(**other)))


def test_an_error_in_the_last_point_starts_nothing(tmp_path, capsys):
    root = tmp_path / "root"
    for extra, match in (
        ({"train.lrr": 1.0}, "'bad'.*'train.lrr'.*'train.lr'"),
        ({"train.steps": 0}, "'bad'.*train.steps"),
        ({"train.lr": "much"}, "'bad'.*train.lr"),
    ):
        with pytest.raises(UserError, match=match):
            sweep(write(tmp_path, extra), root)
    good = write(tmp_path, {})
    for arguments, match in (({"only": "god"}, "'god'.*'good'"), ({"jobs": 0}, "jobs")):
        with pytest.raises(UserError, match=match):
            sweep(good, root, **arguments)
    assert cli.main(["sweep", good, "--root", str(root), "--only", "god"]) == 2
    assert cli.main(["sweep", good, "--root", str(root), "--table"]) == 2
    assert cli.main(["sweep", good, "--root", str(root), "--table", "--only", "bad"]) == 2
    assert cli.main(["sweep", str(tmp_path / "missing.py"), "--root", str(root)]) == 2
    assert cli.main(["sweep", write(tmp_path, {}, "get_sweep = dict"), "--root", str(root)]) == 2
    assert cli.main(["sweep", write(tmp_path, {}, ""), "--root", str(root)]) == 2
    assert all(line.startswith("marjax sweep: ") for line in capsys.readouterr().err.splitlines())
    assert not root.exists()


@pytest.mark.slow
def test_a_point_fails_and_the_sweep_resumes(tmp_path, capsys):
    file, root = write(tmp_path, {"seed": 1}), tmp_path / "root"
    command = ["sweep", file, "--root", str(root)]
    assert cli.main([*command, "--jobs", "2"]) == 1
    printed = capsys.readouterr()
    assert "good: finished in" in printed.out and "bad: failed after" in printed.out
    assert "1 of 2 points failed: bad;" in printed.err and printed.err.count("marjax sweep: error: ") == 1
    assert "sweep: 0 of 2 points\n" in printed.err and "sweep: 2 of 2 points, " in printed.err

    def written():
        with (root / "table.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len((root / "table.md").read_text().splitlines()) == len(rows) + 2
        return rows

    rows = written()
    assert list(rows[0]) == ["point", "seed", "step", "train/loss", "weights", "score", "status", "seconds", "error"]
    assert [(row["point"], row["seed"], row["step"], row["weights"], row["status"], row["error"]) for row in rows] == [
        ("good", "0", "2", "raw", "done", ""),
        ("good", "0", "2", "ema", "done", ""),
        ("bad", "1", "2", "", "failed", "ValueError: no"),
    ]
    metrics = [json.loads(line) for line in (root / "good" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2] and float(rows[0]["train/loss"]) == metrics[1]["train/loss"]
    assert float(rows[1]["score"]) == np.float32(1 / 3).item() + 1
    assert "measuring good" in (root / "logs" / "good.log").read_text()
    assert "Traceback" in (root / "logs" / "bad.log").read_text()
    assert (root / "report.txt").read_text() == "done done failed"

    # Once the cause is fixed, only the failed point runs; its training is already complete.
    times = {
        path: path.stat().st_mtime_ns
        for name in ("result.json", "config.json", "metrics.jsonl")
        for path in (root / "good" / name,)
    }
    (root / "mended").touch()
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "good: already finished, skipped" in printed and "bad: started" in printed and "good: started" not in printed
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [row["status"] for row in written()] == ["done"] * 4 and "error" not in written()[0]
    assert "resuming at step 2 of 2" in (root / "logs" / "bad.log").read_text()
    assert (root / "logs" / "bad.log").read_text().count("measuring bad") == 2

    # A point that was finished with another config fails, and nothing runs.
    before = (root / "bad" / "result.json").read_text()
    changed = write(tmp_path, {"seed": 2})
    assert cli.main(["sweep", changed, "--root", str(root)]) == 1
    assert "started" not in capsys.readouterr().out
    assert (root / "bad" / "result.json").read_text() == before
    assert "seed (was 1, now 2)" in written()[2]["error"]
    assert cli.main(["sweep", changed, "--root", str(root), "--only", "good"]) == 0
    assert cli.main(["sweep", write(tmp_path, {"seed": 1}), "--root", str(root), "--table"]) == 0
    assert [row["status"] for row in written()] == ["done"] * 4


def test_a_process_that_ends_without_a_record(tmp_path, capsys):
    sweep_run = SweepRun.open(write(tmp_path, {}), tmp_path)
    (tmp_path / "logs").mkdir()
    for text, code, match in (
        ("--- started\nstep 1\n", -9, "ended by SIGKILL; last output: step 1"),
        ("--- started\n", 0, "ended with exit code 0"),
        ("--- started\n", 7, "exit code 7"),
    ):
        sweep_run.failure("bad").unlink(missing_ok=True)
        sweep_run.log("bad").write_text(text)
        runner._report_exit(sweep_run, "bad", code, 1.5)
        assert match in capsys.readouterr().out
        rows = table(sweep_run.path, sweep_run.root)
        assert [row["status"] for row in rows] == ["unfinished", "failed"] and match in rows[1]["error"]
        assert rows[1]["seconds"] == 1.5


def is_alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_logs_of_a_remote_root(tmp_path, monkeypatch):
    """A stopped sweep keeps the log of a point, including its output on another machine."""
    sweep_run = SweepRun.open(write(tmp_path, {}), tmp_path / "root")
    (sweep_run.root / "logs").mkdir(parents=True)
    sweep_run.log("good").write_text("elsewhere\n")
    monkeypatch.setattr(runner, "is_remote", lambda _: True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for printed, seconds in (("here", 60), ("again", 0)):
        code = f"import time; print({printed!r}, flush=True); time.sleep({seconds})"
        monkeypatch.setattr(SweepRun, "command", lambda *_, code=code: [sys.executable, "-c", code])

        def stop():
            while "here" not in pathlib.Path(runner._log_path(sweep_run, "good")).read_text():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(SystemExit) if seconds else contextlib.nullcontext():
            if seconds:
                threading.Timer(0.5, stop).start()
            runner.run(sweep_run, ["good"], 1, None, lambda: None)
    lines = sweep_run.log("good").read_text().splitlines()
    assert [line for line in lines if not line.startswith("---")] == ["elsewhere", "here", "again"]
    assert not list((tmp_path / "home").rglob("*.log"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_one_sweep_at_a_time_and_it_ends_its_processes(tmp_path, how):
    file, root = (
        write(
            tmp_path,
            {},
            FILE.replace(
                'write_text("yes")',
                'write_text("yes"); import os, time; print(os.getpid(), flush=True); time.sleep(600)',
            ),
        ),
        tmp_path / "root",
    )
    # A shell starts background jobs with SIGINT ignored, and the sweep would keep ignoring it.
    process = subprocess.Popen(
        [sys.executable, "-m", "marjax", "sweep", file, "--root", str(root)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log, child = root / "logs" / "_prepare.log", 0
    limit = time.monotonic() + 300
    try:
        while not (log.exists() and log.read_text().count("\n") > 1) and time.monotonic() < limit:
            assert process.poll() is None
            time.sleep(0.1)
        child = int(log.read_text().split()[-1])
        assert os.getsid(child) == child
        with pytest.raises(UserError, match="marjax sweep"):
            sweep(file, root)
        process.send_signal(how)
        code = process.wait(timeout=300)
        assert code == {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how]
        if how == signal.SIGKILL:  # the child notices
            while is_alive(child) and time.monotonic() < limit:
                time.sleep(0.05)
        assert not is_alive(child)
        assert not (root / "good").exists() and not list((root / "logs").glob("*.failed.json"))
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            if child:
                os.killpg(child, signal.SIGKILL)
