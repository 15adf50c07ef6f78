"""Locks: never two holders, whatever ends; what their files may do to others' files; leases where there is no flock."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.configs import QUICK, flags
from support.gcs import FakeGcs, run_with_gcs
from support.paths import DIGITS

from marjax import cli, lock
from marjax.errors import UserError

LEASE = f"{lock.NAME}.lease"  # where there is no flock

# Claims the lock of a folder for so many times; with it held, creates a file that nobody else may have created.
LOOP = """
import os, sys
from marjax import cli, lock
from marjax.errors import UserError
folder, times, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if what == "lease":
    import errno
    def none(*_): raise OSError(errno.ENOLCK, "no locks")
    lock.fcntl.flock = none
    lock._POLL = 0.005
lock._PATIENCE = 0.01
held = refused = 0
while held < times:
    try:
        with lock.locked_folder(folder, "loop"):
            os.close(os.open(folder + "/held", os.O_CREAT | os.O_EXCL))
            os.unlink(folder + "/held")
            held += 1
    except UserError:
        refused += 1
print(held, refused)
"""


@pytest.mark.parametrize(("what", "times"), [("flock", 150), ("lease", 8)])
def test_processes_that_claim_in_a_tight_loop_never_hold_it_together(tmp_path, what, times):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path), str(times), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.startswith(f"{times} "), err
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from marjax import cli, lock
with lock.locked_folder(sys.argv[1], "marjax train"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(folder, code=HOLD, **environment):
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.1)
    monkeypatch.setattr(lock, "_POLL", 0.02)


def test_the_error_names_who_holds_it_and_a_kill_frees_it_at_once(tmp_path, hasty):
    with holder(tmp_path) as process:
        with pytest.raises(UserError) as refused, lock.locked_folder(tmp_path, "marjax train"):
            pass
        for part in (str(tmp_path), "marjax train", socket.gethostname(), str(process.pid), "since 20", "UTC", "wait"):
            assert part in str(refused.value)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / lock.NAME).exists()  # what the killed one has left
        with lock.locked_folder(tmp_path, "marjax train"):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "make",
    [
        lambda path, other: path.symlink_to(other),
        lambda path, other: os.link(other, path),
        lambda path, other: path.write_bytes(other.read_bytes()),
        lambda path, other: path.mkdir(),
        lambda path, other: os.mkfifo(path),
    ],
)
def test_what_has_the_name_of_a_lock_and_is_none_is_left_alone(tmp_path, make):
    other = tmp_path / "precious"
    other.write_text("text")
    make(tmp_path / "x.lock", other)
    before = [(path.name, path.lstat().st_mode, path.lstat().st_size) for path in sorted(tmp_path.iterdir())]
    with pytest.raises(UserError, match=r"x\.lock"), lock.locked_file(tmp_path / "x", "marjax export"):
        pass
    assert [(path.name, path.lstat().st_mode, path.lstat().st_size) for path in sorted(tmp_path.iterdir())] == before
    assert other.read_text() == "text"


@pytest.mark.parametrize("content", [b'{"marjax_lock": 1, "comm', b'{"marjax_lock": 2, "at": 3}\n', bytes(2), b""])
def test_what_a_lock_of_a_dead_process_may_hold(tmp_path, content):
    """What a full disk cut off, another version wrote, or a machine lost when its power failed."""
    (tmp_path / lock.NAME).write_bytes(content)
    with lock.locked_folder(tmp_path, "marjax train"):
        assert lock._Holder.parse((tmp_path / lock.NAME).read_bytes()).pid == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_dangling_symlink_creates_nothing(tmp_path):
    (tmp_path / lock.NAME).symlink_to(tmp_path / "target")
    with pytest.raises(UserError, match=lock.NAME), lock.locked_folder(tmp_path, "marjax train"):
        pass
    assert not (tmp_path / "target").exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(UserError, match=f"{tmp_path}.*Read-only") as refused, lock.locked_folder(tmp_path, "x"):
        pass
    assert "\n" not in str(refused.value)


def test_a_folder_made_for_the_lock_does_not_stay_empty(tmp_path):
    with lock.locked_folder(tmp_path / "new", "x"):
        pass
    with lock.locked_folder(tmp_path / "used", "x"):
        (tmp_path / "used" / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


@pytest.fixture
def without_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def write_holder(path, **fields):
    """A lease as the process of another machine wrote it."""
    other = dataclasses.replace(lock._Holder.here("marjax train"), **fields)
    pathlib.Path(path).write_bytes(other.to_bytes())
    return other


def test_a_lease_of_this_machine(tmp_path, hasty, without_flock):
    ours = lock._Holder.here("marjax train")
    with (
        lock.locked_folder(tmp_path, "marjax train"),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
        lock.locked_folder(tmp_path, "other"),
    ):
        pass
    write_holder(tmp_path / LEASE, started=f"{ours.started}0")  # another process had this number
    with lock.locked_folder(tmp_path, "marjax train"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lease_of_another_machine_is_waited_for_and_taken_over(tmp_path, hasty, without_flock, monkeypatch, capsys):
    monkeypatch.setattr(lock, "_STALE", 0.3)
    write_holder(tmp_path / LEASE, boot="another", host="far")
    with lock.locked_folder(tmp_path, "marjax train"):
        assert lock._Holder.parse((tmp_path / LEASE).read_bytes()).host == socket.gethostname()
    assert "locked by marjax train on host far" in capsys.readouterr().err
    monkeypatch.setattr(lock, "_STALE", 600.0)
    write_holder(tmp_path / LEASE, boot="another", host="far", time=time.time() - 3600)
    with lock.locked_folder(tmp_path, "marjax train"):
        pass


def test_a_lease_that_is_refreshed_is_not_taken_over(tmp_path, hasty, without_flock, monkeypatch):
    monkeypatch.setattr(lock, "_REFRESH", 0.05)
    here = lock._machine
    with lock.locked_folder(tmp_path, "marjax train"):
        monkeypatch.setattr(lock, "_machine", lambda: ("another", "machine"))
        with pytest.raises(UserError, match="is being written by marjax train"), lock.locked_folder(tmp_path, "other"):
            pass
        monkeypatch.setattr(lock, "_machine", here)
    assert not list(tmp_path.iterdir())


LEASED = """
import errno, sys, time
from marjax import cli, lock
def none(*_): raise OSError(errno.ENOLCK, "no locks")
lock.fcntl.flock = none
lock._REFRESH = 0.05
with lock.locked_folder(sys.argv[1], "marjax train"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_who_has_lost_a_lease_ends(tmp_path):
    with holder(tmp_path, LEASED) as process:
        write_holder(tmp_path / "new", boot="another", host="far")
        os.replace(tmp_path / "new", tmp_path / LEASE)
        assert process.wait(timeout=20) == 1


def test_in_a_bucket():
    pytest.importorskip("gcsfs")
    with FakeGcs("bucket") as google:
        done = run_with_gcs(google.address, "support.programs.gcs_lock")
    assert "all is well" in done.stdout, done.stderr


SWEEP = f"""
CONFIG = {DIGITS + ":debug"!r}

def get_sweep():
    yield "point", {{}}
"""


@pytest.mark.parametrize(
    ("arguments", "locked"),
    [
        (["train", "--config", f"{DIGITS}:debug", "--workdir", "OUT", *flags(QUICK)], "OUT/marjax.lock"),
        (
            [
                "train-tokenizer",
                "--config",
                f"{DIGITS}:debug",
                "--config.tokenizer.name=codebook",
                "--out",
                "OUT/x.npz",
                "--config.tokenizer.num_codes=16",
                "--config.model.head=categorical",
            ],
            "OUT/x.npz.lock",
        ),
        (["train-classifier", "--config", f"{DIGITS}:debug", "--out", "OUT/x.npz"], "OUT/x.npz.lock"),
        (["sweep", "SWEEP", "--root", "OUT"], "OUT/sweep.lock"),
    ],
)
def test_commands_that_write_are_refused_while_another_does(tmp_path, hasty, capsys, arguments, locked):
    """One line that says who holds it, and nothing written."""
    (tmp_path / "sweep.py").write_text(SWEEP)
    given = [
        each.replace("OUT", str(tmp_path / "out")).replace("SWEEP", str(tmp_path / "sweep.py")) for each in arguments
    ]
    (tmp_path / "out").mkdir()
    held = tmp_path / locked.replace("OUT", "out")
    with lock.locked(lock.epath.Path(held), "x", "marjax test"):
        assert cli.main(given) == 2
    *_, line = capsys.readouterr().err.splitlines()
    for part in ("marjax test", socket.gethostname(), f"process {os.getpid()}", "since"):
        assert part in line
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


ORPHANS = """
import subprocess, sys, time
from marjax import lock
WAITS = "import os, sys, time\\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"
with lock.locked_folder(sys.argv[1], "marjax sweep") as held:
    subprocess.Popen([sys.executable, "-c", WAITS, sys.argv[1] + "/go"], pass_fds=(held,), stdout=subprocess.DEVNULL)
    print("held", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_has_started_is_waited_for(tmp_path, hasty, monkeypatch):
    with holder(tmp_path, ORPHANS) as process:
        process.kill()
        process.wait()
        monkeypatch.setattr(lock, "_ORPHAN_PATIENCE", 0.0)
        with pytest.raises(UserError, match="child process"), lock.locked_folder(tmp_path, "marjax sweep"):
            pass
        (tmp_path / "go").touch()
        monkeypatch.setattr(lock, "_ORPHAN_PATIENCE", 60.0)
        with lock.locked_folder(tmp_path, "marjax sweep"):
            pass
