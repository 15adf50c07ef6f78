"""launch/local.py with small Python programs: what they are told, how they are ended, when they are started again."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from support.paths import ROOT

LAUNCHER = ROOT / "launch" / "local.py"
spec = importlib.util.spec_from_file_location("launch_local", LAUNCHER)
local = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local)

# Ends as marjax does: with 42 after SIGTERM to any of the processes, which learn of it from each other; with 134 when
# one is gone. STATE is a folder of theirs. The first start goes on until something happens, a later one finishes.
TRAINING = """
import os, pathlib, signal, sys, time
state, me = pathlib.Path(sys.argv[1]), os.environ["JAX_PROCESS_ID"]
if (state / "started").exists() and not any(state.glob("pid*")):
    print("resumed")
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: (state / "stop").touch())
partial = state / f"partial{me}"
partial.write_text(str(os.getpid()))
partial.rename(state / f"pid{me}")
while True:
    time.sleep(0.02)
    alive = [path for path in state.glob("pid*")]
    if len(alive) == 2:
        (state / "started").touch()
    if (state / "stop").exists() and (state / "started").exists():
        time.sleep(0.2)
        (state / f"pid{me}").unlink()
        sys.exit(42)
    if (state / "dead").exists():
        time.sleep(0.2)
        (state / f"pid{me}").unlink()
        sys.exit(134)
"""


def test_processes_use_no_proxy_between_them():
    assert not {"no_proxy", "NO_PROXY"} & local.environment(0, 2, 1, 9, {"PATH": "x"}).keys()
    for own, expected in (
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "a,.b"}, "a,.b,127.0.0.1,localhost"),
        ({"no_proxy": "c", "NO_PROXY": "a"}, "c,127.0.0.1,localhost"),
    ):
        for name in ("http_proxy", "HTTPS_PROXY", "all_proxy"):
            made = local.environment(0, 2, 1, 9, {name: "http://127.0.0.1:9", **own})
            assert made["no_proxy"] == made["NO_PROXY"] == expected and made[name] == "http://127.0.0.1:9"


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def wait_for(*paths):
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} came"
        time.sleep(0.02)


def is_alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def start(*arguments, state):
    """The launcher with TRAINING in two processes, both of which have started; and their process ids."""
    launcher = subprocess.Popen(
        [
            sys.executable,
            str(LAUNCHER),
            "--processes",
            "2",
            "--grace",
            "20",
            *arguments,
            "--",
            *python(TRAINING, state),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(state / "pid0", state / "pid1", state / "started")
    return launcher, [int((state / f"pid{index}").read_text()) for index in range(2)]


def test_every_process_is_told_where_the_others_are():
    lines = []
    code = local.run(
        python(
            "import os; print(*[os.environ['JAX_' + name] for name in ('COORDINATOR_ADDRESS', "
            "'NUM_PROCESSES', 'PROCESS_ID', 'PLATFORMS', 'NUM_CPU_DEVICES')]); print('end', end='')"
        ),
        3,
        4,
        write=lines.append,
    )
    assert code == 0
    first = [line for line in sorted(lines) if "127.0.0.1" in line]
    address = first[0].split()[1]
    assert first == [f"[{index}] {address} 3 {index} cpu 4" for index in range(3)]
    assert sorted(line for line in lines if "end" in line) == [f"[{index}] end" for index in range(3)]


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((0, 3), 3), ((134, 2), 2), ((134, 134), 134), ((0, 134), 134), ((42, 42), 42)]
)
def test_the_code_that_tells_most_is_kept(codes, expected):
    assert local.first_bad(codes) == expected


def test_the_first_failure_ends_the_others_and_gives_the_code(tmp_path):
    """Process 1 fails; 0 does not notice, ignores SIGTERM too and has a child of its own: all are gone afterwards."""
    stubborn = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1':\n"
        "    while not pathlib.Path(sys.argv[1], 'pids').exists(): time.sleep(0.02)\n"
        "    sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "pathlib.Path(sys.argv[1], 'partial').write_text(f'{os.getpid()} {child.pid}')\n"
        "os.rename(sys.argv[1] + '/partial', sys.argv[1] + '/pids')\n"
        "time.sleep(600)\n"
    )
    lines = []
    kill_seconds, local._KILL_SECONDS = local._KILL_SECONDS, 0.2
    try:
        assert local.run(python(stubborn, tmp_path), 2, 1, grace=0.2, write=lines.append) == 3
    finally:
        local._KILL_SECONDS = kill_seconds
    assert lines == [
        "local: process 1 ended with 3; the others have 0.2 s to end",
        "local: 0 still running: ending them",
    ]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and not any(map(is_alive, pids))


def test_what_the_processes_notice_in_time_is_left_to_them(tmp_path):
    launcher, pids = start(state=tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    (tmp_path / "dead").touch()
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 137  # not 134, by which process 0 says no more than that it lost another
    assert "process 1 ended with 137; the others have 20 s" in output and "ending them" not in output
    assert not any(map(is_alive, pids))


def test_a_killed_process_restarts_the_run(tmp_path):
    launcher, pids = start("--restarts", "2", state=tmp_path)
    os.kill(pids[0], signal.SIGKILL)
    (tmp_path / "pid0").unlink()
    (tmp_path / "dead").touch()
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0
    assert "ended with 137; starting again, 2 restarts left" in output
    assert "[0] resumed" in output and "[1] resumed" in output


def test_sigterm_to_one_process_restarts_the_run(tmp_path):
    launcher, pids = start("--restarts", "1", state=tmp_path)
    os.kill(pids[1], signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0
    assert "local: ended with 42; starting again, 1 restart left" in output and "[1] resumed" in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_goes_to_all_and_restarts_nothing(tmp_path, number, code):
    """A Python program that does not catch KeyboardInterrupt is ended by SIGINT itself: 128 + 2."""
    launcher, pids = start("--restarts", "5", state=tmp_path)
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert "starting again" not in output and not any(map(is_alive, pids))


def test_restarts_are_for_preemption_and_loss_and_have_an_end(tmp_path):
    count = (
        "import os, pathlib, sys\n"
        "if os.environ['JAX_PROCESS_ID'] == '0': open(sys.argv[1], 'a').write('x')\n"
        "sys.exit(int(sys.argv[2]))"
    )
    for code, restarts, starts in ((1, 2, 1), (2, 2, 1), (127, 2, 1), (42, 2, 3), (134, 2, 3), (134, 9, 4), (42, 5, 6)):
        file, lines = tmp_path / f"starts{code}-{restarts}", []
        assert local.run_with_restarts(python(count, file, code), 2, 1, restarts=restarts, write=lines.append) == code
        assert file.read_text() == "x" * starts
        assert any("given up, after 4 starts in a row" in line for line in lines) == (restarts == 9)


def test_losses_of_a_run_that_has_lasted_do_not_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_QUICK_SECONDS", 0.0)
    file = tmp_path / "starts"
    code = f"open({str(file)!r}, 'a').write('x'); raise SystemExit(134)"
    assert local.run_with_restarts(python(code), 1, 1, restarts=5, write=lambda line: None) == 134
    assert file.read_text() == "x" * 6


def test_a_slip_of_one_process_is_final(tmp_path):
    """The others lose it, and say so: the first code counts."""
    code = (
        "import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1':\n    sys.exit(2)\ntime.sleep(0.5)\nsys.exit(134)"
    )
    lines = []
    assert local.run_with_restarts(python(code), 2, 1, restarts=5, write=lines.append) == 2
    assert not any("starting again" in line for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--processes", "0", "--", "true"],
        ["--restarts", "-1", "--", "true"],
        [],
        ["--process", "2", "--", "true"],
        ["--", "no-such-program"],
    ],
)
def test_slips_are_told_in_a_line(arguments):
    ended = subprocess.run([sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "error: " in ended.stderr and "Traceback" not in ended.stderr


def test_it_needs_only_python():
    """It must start where marjax is installed for another interpreter, and must not take an accelerator."""
    code = (
        f"import runpy, sys; sys.argv = ['local.py', '--', 'true']\ntry: runpy.run_path({str(LAUNCHER)!r}, "
        "run_name='__main__')\nexcept SystemExit as end: assert not end.code\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('jax', 'marjax', 'numpy')]"
    )
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def wait_until_gone(pids):
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"some of {pids} are left"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_launcher_that_goes_leaves_no_process(tmp_path, number):
    """They are asked to stop, and so could save: the first that is has put a file there."""
    launcher, pids = start(state=tmp_path)
    launcher.send_signal(number)
    wait_until_gone(pids)
    assert (tmp_path / "stop").exists()
    launcher.communicate(timeout=60)
    assert launcher.returncode == (42 if number == signal.SIGHUP else -number)


def test_what_does_not_listen_is_killed_and_so_are_its_own_processes(tmp_path):
    code = (
        "import os, pathlib, signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'], preexec_fn=lambda: signal.signal(signal.SIGTERM, "
        "signal.SIG_IGN))\npathlib.Path(sys.argv[1], 'partial').write_text(f'{os.getpid()} {child.pid}')\n"
        "os.rename(sys.argv[1] + '/partial', sys.argv[1] + '/pids')\ntime.sleep(600)\n"
    )
    script = LAUNCHER.read_text().replace("(signal.SIGTERM, 15.0)", "(signal.SIGTERM, 0.2)")
    (tmp_path / "local.py").write_text(script)
    launcher = subprocess.Popen(
        [sys.executable, str(tmp_path / "local.py"), "--processes", "1", "--", *python(code, tmp_path)]
    )
    wait_for(tmp_path / "pids")
    launcher.kill()
    launcher.wait()
    wait_until_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


@pytest.mark.parametrize("after", [0.0, 0.03, 0.06, 0.09, 0.12])
def test_a_launcher_that_is_killed_while_it_starts(tmp_path, after):
    """There is no moment when a process is started and not yet watched."""
    mark = f"sleep-{os.getpid()}-{after}"
    launcher = subprocess.Popen(
        [sys.executable, str(LAUNCHER), "--processes", "4", "--", *python("import time; time.sleep(600)", mark)]
    )
    time.sleep(after)
    launcher.kill()
    launcher.wait()

    wait_until_gone(
        [int(path.parent.name) for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if mark in contents(path)]
    )


def contents(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
