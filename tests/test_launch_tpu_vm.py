"""launch/tpu_vm.sh with a stand-in for gcloud, whose workers are folders here: what it asks for, and what arrives."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

LAUNCHER = str(ROOT / "launch" / "tpu_vm.sh")
WHERE = ["--project=proj", "--zone=us-east5-b"]
WORKERS = 2

# Records its arguments. A queued resource goes through the states in the file `states`, the last of which stays. ssh
# does what the real one does with its command: it goes, as one string, to a shell in the home folder of each worker.
GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys
here, arguments = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
with open(here / "calls", "a") as calls:
    print(json.dumps(arguments), file=calls)
flags = dict(argument[2:].split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
homes = [here / f"worker{{i}}" for i in range({WORKERS})]
if flags.get("worker", "all") != "all":
    homes = [homes[int(flags["worker"])]]
match arguments[2:4]:
    case ["queued-resources", "describe"]:
        states = (here / "states").read_text().split()
        (here / "states").write_text(" ".join(states[1:] or states))
        if states[0] == "NONE":
            sys.exit("ERROR: NOT_FOUND")
        print(states[0])
    case ["tpu-vm", "scp"]:
        for home in homes:
            shutil.copy(arguments[4], home / arguments[5].split(":")[1])
    case ["tpu-vm", "ssh"]:
        for home in homes:
            ended = subprocess.run(["bash", "-c", flags["command"]], cwd=home, env={{**os.environ, "HOME": str(home)}})
            if ended.returncode:
                sys.exit(ended.returncode)
"""

# Stands for Python 3.13 on a worker, so that nothing is installed: makes a virtual environment that records what pip
# was to install.
PYTHON = f"""#!/bin/bash
if [[ "$*" == "-m venv --clear "* ]]; then
    mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "PATH=$PWD/$4/bin:\\$PATH" >"$4/bin/activate"
elif [[ "$*" == "-m pip install "* ]]; then
    echo "$*" >>"$HOME/installed"
else
    exec {sys.executable} "$@"
fi
"""

# Ends with the codes in the file `codes` of its home, one a start, then as `then` says; its arguments go to `starts`.
TRAINING = """
import json, os, pathlib, signal, sys, time
home = pathlib.Path(os.environ["HOME"])
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(42)))
with open(home / "starts", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file, flush=True)
codes = (home / "codes").read_text().split() if (home / "codes").exists() else []
(home / "codes").write_text(" ".join(codes[1:]))
print("step", 1)
if codes:
    sys.exit(int(codes[0]))
time.sleep(600)
"""


@pytest.fixture
def cloud(tmp_path):
    """A folder with the stand-ins, a folder for each worker, and no slice yet."""
    for name, text in (("gcloud", GCLOUD), ("python3.13", PYTHON)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for index in range(WORKERS):
        (tmp_path / f"worker{index}" / "marjax").mkdir(parents=True)
        shutil.copytree(ROOT / "launch", tmp_path / f"worker{index}" / "marjax" / "launch")
    (tmp_path / "states").write_text("NONE")
    (tmp_path / "calls").write_text("")
    yield tmp_path
    for pid in tmp_path.glob("worker*/marjax/run.pid"):
        subprocess.run(["kill", "-TERM", "--", f"-{pid.read_text().strip()}"], stderr=subprocess.DEVNULL)


def launch(cloud, *arguments, fails=None, **settings):
    """What it printed."""
    environment = {**os.environ, "PATH": f"{cloud / 'bin'}:{os.environ['PATH']}", "CLOUD": str(cloud),
                   "PROJECT": "proj", "ZONE": "us-east5-b", "NAME": "mar", "POLL_SECONDS": "0", **settings}
    ended = subprocess.run([LAUNCHER, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == (fails or 0), ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def calls(cloud):
    return [json.loads(line) for line in (cloud / "calls").read_text().splitlines()]


def starts(cloud, index):
    file = cloud / f"worker{index}" / "starts"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_create_asks_for_a_slice_and_waits(cloud):
    (cloud / "states").write_text("NONE WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    printed = launch(cloud, "--spot", "--type", "v6e-16", "create")
    asked = ["compute", "tpus", "queued-resources"]
    assert calls(cloud) == [
        [*asked, "describe", "mar", *WHERE, "--format=value(state.state)"],
        [*asked, "create", "mar", *WHERE, "--node-id=mar", "--accelerator-type=v6e-16",
         "--runtime-version=v2-alpha-tpuv6e", "--spot"],
        *[[*asked, "describe", "mar", *WHERE, "--format=value(state.state)"]] * 4]
    assert printed.count("WAITING_FOR_RESOURCES") == 1 and printed.endswith("mar is ACTIVE\n")


def test_create_again(cloud):
    """It waits for what was asked for before, and asks anew when that was taken away."""
    (cloud / "states").write_text("PROVISIONING ACTIVE")
    launch(cloud, "create", TYPE="v4-8")
    assert [call[3] for call in calls(cloud)] == ["describe"] * 2
    (cloud / "states").write_text("SUSPENDED WAITING_FOR_RESOURCES ACTIVE")
    launch(cloud, "create", TYPE="v4-8")
    assert [call[3] for call in calls(cloud)[2:]] == ["describe", "delete", "create", "describe", "describe"]
    assert "--force" in calls(cloud)[3] and "--spot" not in calls(cloud)[4]
    (cloud / "states").write_text("NONE WAITING_FOR_RESOURCES FAILED")
    assert "the slice is FAILED: run create again" in launch(cloud, "create", fails=1, TYPE="v4-8")


def test_setup_installs_this_tree_on_every_worker(cloud):
    printed = launch(cloud, "setup")
    assert printed.count("marjax ") == WORKERS and "with jax" in printed
    for index in range(WORKERS):
        home = cloud / f"worker{index}"
        assert (home / "marjax" / "marjax" / "cli.py").read_bytes() == (ROOT / "marjax" / "cli.py").read_bytes()
        assert (home / "marjax" / "launch" / "tpu_vm_worker.sh").stat().st_mode & 0o100
        assert not (home / "marjax" / ".git").exists() and not (home / "marjax" / ".venv-test").exists()
        assert (home / "installed").read_text().split()[-2:] == ["--editable", ".[tpu,gcs]"]
    launch(cloud, "setup")
    assert (cloud / "worker0" / "installed").read_text().count("\n") == 1  # nothing has changed, nothing is installed


def test_arguments_arrive_as_they_are_and_the_run_goes_on_after_preemption_and_loss(cloud):
    odd = ["--config", "configs/x.py:model=mar_base,variant=ar", "--config.data.data_dir=a folder/b,c=d",
           "--x=$HOME `id`", "it's \"quoted\" \\ *", "two\nlines", "", "ä;|&<>(){}!#~", "a  b"]
    for index, codes in enumerate(("42 137 0", "42 134 0")):
        (cloud / f"worker{index}" / "codes").write_text(codes)
    launch(cloud, "run", sys.executable, "-c", TRAINING, *odd, RESTART_SECONDS="0")
    codes = [cloud / f"worker{index}" / "marjax" / "run.code" for index in range(WORKERS)]
    wait_until(lambda: all(code.exists() and code.read_text() for code in codes))
    for index in range(WORKERS):
        assert starts(cloud, index) == [odd] * 3
        assert codes[index].read_text() == "0\n"
    assert launch(cloud, "logs").count("step 1") == 3  # worker 0 alone
    assert launch(cloud, "logs", "all").count("step 1") == 3 * WORKERS
    (cloud / "states").write_text("ACTIVE")
    assert "mar is ACTIVE\n" in launch(cloud, "status") and launch(cloud, "status").count("ended with 0") == WORKERS


@pytest.mark.parametrize(("codes", "most", "number"), [("2 0", "9", 1), ("1 0", "9", 1), ("42 137 42 0", "2", 3)])
def test_what_is_no_preemption_or_too_much_of_it_ends_the_run(cloud, codes, most, number):
    for index in range(WORKERS):
        (cloud / f"worker{index}" / "codes").write_text(codes)
    launch(cloud, "run", sys.executable, "-c", TRAINING, RESTART_SECONDS="0", MAX_RESTARTS=most)
    files = [cloud / f"worker{index}" / "marjax" / "run.code" for index in range(WORKERS)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    assert [file.read_text().strip() for file in files] == [codes.split()[number - 1]] * WORKERS
    assert [len(starts(cloud, index)) for index in range(WORKERS)] == [number] * WORKERS


def test_stop_waits_for_the_save_and_the_run_can_be_started_again(cloud):
    run = ["run", sys.executable, "-c", TRAINING]
    launch(cloud, *run, RESTART_SECONDS="0")
    wait_until(lambda: all(starts(cloud, index) for index in range(WORKERS)))
    assert "running; last line: " in launch(cloud, "status")
    assert "a run is under way here" in launch(cloud, *run, fails=2)
    assert launch(cloud, "stop").count("ended with 42") == WORKERS  # which is no reason to start again
    assert [len(starts(cloud, index)) for index in range(WORKERS)] == [1] * WORKERS
    assert launch(cloud, "stop").count("nothing runs here") == WORKERS
    launch(cloud, *run)
    wait_until(lambda: all(len(starts(cloud, index)) == 2 for index in range(WORKERS)))
    launch(cloud, "stop")


def test_delete(cloud):
    launch(cloud, "delete")
    assert calls(cloud) == [["compute", "tpus", "queued-resources", "delete", "mar", *WHERE, "--force", "--quiet"]]


@pytest.mark.parametrize(("arguments", "settings", "said"), [
    ([], {}, "say what to do"),
    (["run"], {}, "run needs a command"),
    (["start"], {}, "unknown action start"),
    (["--zome", "a", "create"], {}, "unknown option --zome"),
    (["--zone"], {}, "--zone needs a value"),
    (["create"], {"ZONE": "", "TYPE": "v4-8"}, "no zone: give --zone, or set ZONE"),
    (["create"], {"TYPE": ""}, "no type: give --type"),
    (["--type", "v9-4", "create"], {}, "no runtime is known for v9-4: give --version"),
])
def test_slips_are_told_before_anything_is_asked_for(cloud, arguments, settings, said):
    assert f"launch/tpu_vm.sh: error: {said}" in launch(cloud, *arguments, fails=2, **settings)
    assert not calls(cloud)


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_the_real_gcloud_knows_the_flags(cloud):
    """By its help: nothing is asked for."""
    (cloud / "states").write_text("SUSPENDED ACTIVE")
    launch(cloud, "--spot", "--type", "v6e-16", "create")
    launch(cloud, "run", "true", SSH_FLAGS="--internal-ip")
    with open(cloud / "calls", "a") as file:  # as `setup` does
        file.write(json.dumps(["compute", "tpus", "tpu-vm", "scp", "a", "b:a", *WHERE, "--worker=all"]))
    seen = {}
    for call in calls(cloud):
        seen.setdefault(tuple(call[:4]), set()).update(flag.split("=")[0] for flag in call if flag.startswith("--"))
    assert len(seen) == 5
    for command, flags in seen.items():
        text = subprocess.run(["gcloud", *command, "--help"], capture_output=True, text=True, check=True).stdout
        plain = "".join(char for char in text if char.isprintable() or char.isspace()).replace("[1m", "")
        assert not {flag for flag in flags if f"{flag}" not in plain}, command
