"""launch/tpu_vm.sh with a stand-in for gcloud, whose workers are folders here: what it asks for, and what arrives."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from support.gcloud import unknown
from support.paths import ROOT

LAUNCHER = str(ROOT / "launch" / "tpu_vm.sh")
WHERE = ["--project=proj", "--zone=us-east5-b"]
WORKERS = 2

# Records its arguments. A queued resource goes through the states in the file `states`, the last of which stays; one
# that is deleted takes its workers with it, and the next one's get the next codes of the file `codes`. ssh does what
# the real one does with its command: it goes, as one string, to a shell in the home folder of each worker, which knows
# nothing of the caller's variables. On a worker, `gcloud storage cp` notes what it was to copy.
GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, signal, subprocess, sys
here, arguments = pathlib.Path(__file__).parent.parent, sys.argv[1:]
if arguments[:2] == ["storage", "cp"]:
    with open("fetched", "a") as file:
        sys.exit(print(json.dumps(arguments[2:]), file=file))
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
            sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'mar' was not found")
        if states[0] == "SILENT":
            sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) UNAVAILABLE: try again")
        print(states[0])
    case ["queued-resources", "delete"]:
        for home in homes:
            if (home / "marjax" / "run.pid").exists():
                os.killpg(int((home / "marjax" / "run.pid").read_text()), signal.SIGKILL)
            home.rename(here / f"gone{{len(list(here.glob('gone*')))}}")
    case ["queued-resources", "create"]:
        now, *later = (here / "codes").read_text().split(";")
        (here / "codes").write_text(";".join(later))
        for home in homes:
            home.mkdir(exist_ok=True)
            (home / "codes").write_text(now)
    case ["tpu-vm", "scp"]:
        for home in homes:
            shutil.copy(arguments[4], home / arguments[5].split(":")[1])
    case ["tpu-vm", "ssh"]:
        for home in homes:
            ended = subprocess.run(["bash", "-c", flags["command"]], cwd=home,
                                   env={{"PATH": os.environ["PATH"], "HOME": str(home)}})
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
    (tmp_path / "codes").write_text("")
    yield tmp_path
    for pid in tmp_path.glob("worker*/marjax/run.pid"):
        subprocess.run(["kill", "-TERM", "--", f"-{pid.read_text().strip()}"], stderr=subprocess.DEVNULL)


def launch(cloud, *arguments, fails=None, launcher=LAUNCHER, **settings):
    """What it printed."""
    environment = {
        **os.environ,
        "PATH": f"{cloud / 'bin'}:{os.environ['PATH']}",
        "PROJECT": "proj",
        "ZONE": "us-east5-b",
        "NAME": "mar",
        "POLL_SECONDS": "0",
        **settings,
    }
    ended = subprocess.run([launcher, *arguments], env=environment, capture_output=True, text=True, timeout=120)
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


def test_create_requests_a_slice_and_waits(cloud):
    (cloud / "states").write_text("NONE WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    printed = launch(cloud, "--spot", "--type", "v6e-16", "create")
    asked = ["compute", "tpus", "queued-resources"]
    assert calls(cloud) == [
        [*asked, "describe", "mar", *WHERE, "--format=value(state.state)"],
        [
            *asked,
            "create",
            "mar",
            *WHERE,
            "--node-id=mar",
            "--accelerator-type=v6e-16",
            "--runtime-version=v2-alpha-tpuv6e",
            "--spot",
        ],
        *[[*asked, "describe", "mar", *WHERE, "--format=value(state.state)"]] * 4,
    ]
    assert printed.count("WAITING_FOR_RESOURCES") == 1 and printed.endswith("mar is ACTIVE\n")


def test_setup_installs_this_tree_on_every_worker(cloud):
    printed = launch(cloud, "setup")
    assert printed.count("marjax ") == WORKERS and "with jax" in printed
    for index in range(WORKERS):
        home = cloud / f"worker{index}"
        assert (home / "marjax" / "marjax" / "cli.py").read_bytes() == (ROOT / "marjax" / "cli.py").read_bytes()
        assert (home / "marjax" / "launch" / "tpu_vm_worker.sh").stat().st_mode & 0o100
        assert not (home / "marjax" / ".git").exists() and not (home / "marjax" / ".venv-test").exists()
        assert (home / "installed").read_text().split()[-2:] == ["--editable", ".[tpu,gcs]"]
        assert not (home / "fetched").exists()
    launch(cloud, "setup", FETCH="gs://bucket/data gs://bucket/more")
    assert (cloud / "worker0" / "installed").read_text().count("\n") == 1  # nothing has changed, nothing is installed
    for index in range(WORKERS):
        [copied] = (cloud / f"worker{index}" / "fetched").read_text().splitlines()
        assert json.loads(copied) == ["--recursive", "--no-clobber", "gs://bucket/data", "gs://bucket/more", "."]


def test_setup_sends_code_and_no_data(cloud, tmp_path):
    """Untracked files are sent only if they may be code, and nothing beyond MAX_MB."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "launch", tree / "launch")
    for name in (
        "setup.cfg",
        "marjax/a.py",
        "marjax/new.py",
        "configs/mine.py",
        "data/shard",
        "kl16.safetensors",
        "mine/known.py",
        "gone.py",
    ):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(name)
    git = ["git", "-C", str(tree), "-c", "init.defaultBranch=main"]
    for command in (["init", "--quiet"], ["add", "setup.cfg", "launch", "marjax/a.py", "mine/known.py", "gone.py"]):
        subprocess.run([*git, *command], check=True)
    (tree / "gone.py").unlink()
    launcher = str(tree / "launch" / "tpu_vm.sh")
    assert "the code is 0 MB, packed" in launch(cloud, "setup", fails=1, launcher=launcher, MAX_MB="0")
    assert not calls(cloud)
    launch(cloud, "setup", launcher=launcher)
    packed = subprocess.run(["tar", "-tzf", cloud / "worker0" / "marjax.tar.gz"], capture_output=True, text=True)
    assert {name for name in packed.stdout.split() if not name.startswith("launch/")} == {
        "setup.cfg",
        "marjax/a.py",
        "marjax/new.py",
        "configs/mine.py",
        "mine/known.py",
    }


def test_setup_without_git(cloud, tmp_path):
    """In an unpacked sdist."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "launch", tree / "launch")
    code = {"setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "marjax/a.py", "configs/mine.py"}
    for name in code | {"marjax/__pycache__/a.pyc", "data/shard"}:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    launch(cloud, "setup", launcher=str(tree / "launch" / "tpu_vm.sh"))
    packed = subprocess.run(["tar", "-tzf", cloud / "worker0" / "marjax.tar.gz"], capture_output=True, text=True)
    assert {name for name in packed.stdout.split() if not name.startswith("launch/")} == code


def test_run_passes_arguments_unchanged_and_resumes_after_preemption_and_loss(cloud):
    odd = [
        "--config",
        "configs/x.py:model=mar_base,variant=ar",
        "--config.data.data_dir=a folder/b,c=d",
        "--x=$HOME `id`",
        'it\'s "quoted" \\ *',
        "two\nlines",
        "",
        "ä;|&<>(){}!#~",
        "a  b",
    ]
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


def ended(cloud):
    """The codes of the workers, once all have one."""
    files = [cloud / f"worker{index}" / "marjax" / "run.code" for index in range(WORKERS)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [file.read_text().strip().partition(";")[0] for file in files]


@pytest.mark.parametrize(
    ("codes", "settings", "number"),
    [
        ("2 0", {}, 1),
        ("1 0", {}, 1),
        ("127 0", {}, 1),
        ("42 137 42 0", {"MAX_RESTARTS": "2"}, 3),
        ("134 134 42 134 134 134 137 0", {}, 7),
        ("134 134 0", {"MAX_QUICK": "1"}, 1),
        ("134 134 134 134 134 134 0", {"QUICK_SECONDS": "0", "MAX_RESTARTS": "5"}, 6),
    ],
)
def test_run_ends_after_other_errors_and_too_many_restarts(cloud, codes, settings, number):
    for index in range(WORKERS):
        (cloud / f"worker{index}" / "codes").write_text(codes)
    launch(cloud, "run", sys.executable, "-c", TRAINING, RESTART_SECONDS="0", **settings)
    assert ended(cloud) == [codes.split()[number - 1]] * WORKERS
    assert [len(starts(cloud, index)) for index in range(WORKERS)] == [number] * WORKERS


def test_keep_recreates_a_lost_slice(cloud):
    """The second slice is set up like the first, and the run finishes there."""
    (cloud / "states").write_text("NONE WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDING SUSPENDED ACTIVE")
    (cloud / "codes").write_text(";42 0")
    run = ["keep", sys.executable, "-c", TRAINING, "a  b", "c"]
    printed = launch(cloud, "--spot", *run, TYPE="v4-8", FETCH="gs://bucket/data", RESTART_SECONDS="0")
    assert "the slice was taken away" in printed and "mar is still there, and billed" in printed
    assert [call[3] for call in calls(cloud) if call[3] in ("create", "delete")] == ["create", "delete", "create"]
    assert all("--spot" in call for call in calls(cloud) if call[3] == "create")
    for index in range(WORKERS):
        before, home = cloud / f"gone{index}", cloud / f"worker{index}"
        assert [json.loads(line) for line in (before / "starts").read_text().splitlines()] == [["a  b", "c"]]
        assert starts(cloud, index) == [["a  b", "c"]] * 2
        assert (before / "fetched").read_text() == (home / "fetched").read_text()


def test_stop_waits_for_the_checkpoint_and_the_run_can_be_restarted(cloud):
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


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        ([], {}, "say what to do"),
        (["run"], {}, "run needs a command"),
        (["start"], {}, "unknown action start"),
        (["--zome", "a", "create"], {}, "unknown option --zome"),
        (["--zone"], {}, "--zone needs a value"),
        (["create"], {"ZONE": "", "TYPE": "v4-8"}, "no zone: give --zone, or set ZONE"),
        (["create"], {"TYPE": ""}, "no type: give --type"),
        (["keep", "true"], {"TYPE": ""}, "no type: give --type"),
        (["--type", "v9-4", "create"], {}, "no runtime is known for v9-4: give --version"),
    ],
)
def test_invalid_input_fails_before_any_request(cloud, arguments, settings, said):
    assert f"launch/tpu_vm.sh: error: {said}" in launch(cloud, *arguments, fails=2, **settings)
    assert not calls(cloud)


def test_flags_exist_in_the_real_gcloud(cloud):
    (cloud / "states").write_text("SUSPENDED ACTIVE")
    launch(cloud, "--spot", "--type", "v6e-16", "create", CREATE_FLAGS="--internal-ips --data-disk=source=a")
    launch(cloud, "setup", SSH_FLAGS="--internal-ip", FETCH="gs://bucket/data")
    launch(cloud, "run", "true")
    fetched = json.loads((cloud / "worker0" / "fetched").read_text())
    seen = [*calls(cloud), ["storage", "cp", *fetched]]
    assert len({tuple(call[:4]) for call in seen[:-1]}) == 5
    assert not [(call, unknown(call)) for call in seen if unknown(call)]
