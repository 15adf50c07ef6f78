"""launch/sky.yaml and .skyignore: what is sent, what the two scripts do, and what SkyPilot makes of it."""

import glob
import json
import os
import subprocess
import sys

import pytest
from support.launchers import tool_venv
from support.paths import ROOT

from marjax.errors import LOST_PEER, PREEMPTED

yaml = pytest.importorskip("yaml", reason="PyYAML comes with flax")

FILE = ROOT / "launch" / "sky.yaml"
SKYPILOT = "skypilot==0.14.1"  # the version whose words for a task are below

# Of https://docs.skypilot.co/en/latest/reference/yaml-spec.html: those of a task, of its resources, of job_recovery.
TASK = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "envs",
    "secrets",
    "volumes",
    "file_mounts",
    "config",
    "setup",
    "run",
    "service",
    "pool",
}
RESOURCES = {
    "infra",
    "accelerators",
    "accelerator_args",
    "cpus",
    "memory",
    "instance_type",
    "use_spot",
    "disk_size",
    "disk_tier",
    "network_tier",
    "ports",
    "image_id",
    "labels",
    "any_of",
    "ordered",
    "autostop",
    "job_recovery",
}
RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load(FILE.read_text())


def test_it_says_what_skypilot_knows(task):
    """SkyPilot refuses a task with any other word; it says so itself in the test below, where it is installed."""
    assert set(task) <= TASK
    resources = task["resources"]
    assert set(resources) <= RESOURCES and set(resources["job_recovery"]) <= RECOVERY
    assert resources["use_spot"] is True and resources["accelerators"].startswith("tpu-")
    assert {PREEMPTED, LOST_PEER, 137} <= set(resources["job_recovery"]["recover_on_exit_codes"])
    assert not {0, 1, 2} & set(resources["job_recovery"]["recover_on_exit_codes"])
    assert task["envs"]["WORKDIR"] is task["envs"]["BUCKET"] is None  # must be given
    config = task["envs"]["CONFIG"].partition(":")[0]
    assert (ROOT / config).exists() and task["workdir"] == "."


def left(folder):
    """What SkyPilot would send of a folder, by its own way with .skyignore: glob, with / for the folder itself."""
    ignored = set()
    for line in (ROOT / ".skyignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = f".{line}" if line.startswith("/") else f"**/{line}"
            ignored.update(glob.glob(str(folder / pattern), recursive=True))
    ignored = {os.path.normpath(path) for path in ignored}
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not any(str(each) in ignored for each in (path, *path.parents))
    }


RUNS = {
    "marjax/cli.py",
    "marjax/data/latent_cache/write.py",
    "configs/mine.py",
    "launch/sky.yaml",
    "setup.cfg",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
}
DATA = {
    "data/shard",
    "ILSVRC2012_img_train.tar",
    "kl16.ckpt",
    "kl16.safetensors",
    "imagenet_kl16/manifest.json",
    "runs/a",
    "pictures/1.png",
    "samples/1.png",
    "latents/a",
    "mine/a",
    "cache/a",
    "mar_base/a",
    "converted/a",
    "RESULTS",
    "stats.npz",
    "weights.pth",
    ".venv/bin/python",
    ".git/config",
    "tests/conftest.py",
    "marjax/__pycache__/cli.pyc",
    "marjax.egg-info/PKG-INFO",
}


def make_tree(folder):
    for name in RUNS | DATA:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_data_stays_here(tmp_path):
    make_tree(tmp_path)
    assert left(tmp_path) == RUNS
    assert all((ROOT / name.partition("/")[0]).exists() for name in RUNS)


def record(folder, path, code=PREEMPTED):
    """A program that appends its arguments to the file `calls`."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(
        f"#!{sys.executable}\nimport json, sys\nwith open('{folder}/calls', 'a') as file:\n"
        f"    print(json.dumps(sys.argv[1:]), file=file)\nsys.exit({code})\n"
    )
    (folder / path).chmod(0o755)


def test_the_run_gets_its_arguments_as_they_are_and_gives_its_code(task, tmp_path):
    record(tmp_path, "marjax/bin/marjax")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        **task["envs"],
        "WORKDIR": "gs://bucket/a b",
        "BUCKET": "x",
        "ARGUMENTS": "--config.data.data_dir='a b,c=d' --config.seed=1",
    }
    ended = subprocess.run(["bash", "-c", task["run"]], env=environment)
    assert ended.returncode == PREEMPTED
    assert json.loads((tmp_path / "calls").read_text()) == [
        "train",
        "--config",
        task["envs"]["CONFIG"],
        "--workdir",
        "gs://bucket/a b",
        "--config.data.data_dir=a b,c=d",
        "--config.seed=1",
    ]


def test_by_default_it_reads_what_was_copied(task, tmp_path):
    record(tmp_path, "marjax/bin/marjax", 0)
    [(folder, source)] = task["file_mounts"].items()
    assert (folder, source) == ("~/data", "${BUCKET}/data")
    subprocess.run(
        ["bash", "-c", task["run"]],
        check=True,
        env={**os.environ, "HOME": str(tmp_path), **task["envs"], "WORKDIR": "gs://bucket/a", "BUCKET": "x"},
    )
    data = tmp_path / "data"
    assert json.loads((tmp_path / "calls").read_text())[-2:] == [
        f"--config.data.cache={data}/imagenet_kl16",
        f"--config.tokenizer.path={data}/kl16.safetensors",
    ]


@pytest.mark.parametrize("code", [0, 1, 2, PREEMPTED, LOST_PEER, 137])
def test_a_loss_soon_after_the_start_is_final(task, tmp_path, code):
    """SkyPilot counts nothing: of hosts that end with 2 and 134, the latter would start all of them again for ever."""
    record(tmp_path, "marjax/bin/marjax", code)
    environment = {**os.environ, "HOME": str(tmp_path), **task["envs"], "WORKDIR": "x", "BUCKET": "x"}
    codes = [
        subprocess.run(["bash", "-c", script], env=environment, stderr=subprocess.DEVNULL).returncode
        for script in (task["run"], task["run"].replace("-lt 600", "-lt 0"))
    ]
    assert codes == [code if code < 128 else 1, code]


def test_a_failing_setup_is_told(task, tmp_path):
    record(tmp_path, "bin/python3")
    ended = subprocess.run(
        ["bash", "-c", task["setup"]],
        env={**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )
    assert ended.returncode == PREEMPTED  # the stand-in's, of the first line
    assert (tmp_path / "calls").read_text().count("\n") == 1


@pytest.mark.slow
def test_skypilot_takes_it(tmp_path):
    """Offline: no cloud is asked. SkyPilot itself is installed once, in .cache/: 320 MB."""
    make_tree(tmp_path / "tree")
    (tmp_path / "tree" / ".skyignore").write_text((ROOT / ".skyignore").read_text())
    code = (
        "import json, sys, sky\n"
        "from sky.data.storage_utils import get_excluded_files_from_skyignore\n"
        "config = sky.utils.yaml_utils.read_yaml(sys.argv[1])\n"
        "given = [('WORKDIR', 'gs://bucket/run'), ('BUCKET', 'gs://bucket')]\n"
        "task = sky.Task.from_yaml_config(config, env_overrides=given)\n"
        "[resources] = task.resources\n"
        "print(json.dumps([task.name, resources.accelerators, resources.use_spot, resources.job_recovery,\n"
        "                  task.envs['WORKDIR'], str(resources.cloud), task.file_mounts]))\n"
        "print(json.dumps(get_excluded_files_from_skyignore(sys.argv[2])))\n"
        "try:\n    sky.Task.from_yaml(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
    )
    python = tool_venv("skypilot", [SKYPILOT]) / "python"
    ended = subprocess.run(
        [python, "-c", code, FILE, tmp_path / "tree"],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
    )
    assert not ended.returncode, ended.stderr
    made, ignored, refused = ended.stdout.strip().splitlines()[:3]
    expected = yaml.safe_load(FILE.read_text())["resources"]
    assert json.loads(made) == [
        "marjax",
        {expected["accelerators"]: 1},
        True,
        expected["job_recovery"],
        "gs://bucket/run",
        "GCP",
        {"~/data": "gs://bucket/data"},
    ]
    assert not [name for name in json.loads(ignored) if name in RUNS or any(run.startswith(f"{name}/") for run in RUNS)]
    assert {"data", "kl16.safetensors", ".git", "tests"} <= set(json.loads(ignored))
    assert "is None" in refused and ("BUCKET" in refused or "WORKDIR" in refused)
