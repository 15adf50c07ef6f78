"""launch/sky.yaml: what its two scripts do, and, where SkyPilot is at hand, what that makes of it."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from launcher_venv import tool_venv

from marjax.errors import LOST_PEER, PREEMPTED

yaml = pytest.importorskip("yaml", reason="PyYAML comes with flax")

FILE = ROOT / "launch" / "sky.yaml"
SKYPILOT = "skypilot==0.14.1"  # the version whose words for a task are below

# Of https://docs.skypilot.co/en/latest/reference/yaml-spec.html: those of a task, of its resources, of job_recovery.
TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "config", "setup",
        "run", "service", "pool"}
RESOURCES = {"infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size",
             "disk_tier", "network_tier", "ports", "image_id", "labels", "any_of", "ordered", "autostop",
             "job_recovery"}
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
    assert task["envs"]["WORKDIR"] is None  # must be given
    config = task["envs"]["CONFIG"].partition(":")[0]
    assert (ROOT / config).exists() and task["workdir"] == "."


def record(folder, path):
    """A program that appends its arguments to the file `calls`."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(f"#!{sys.executable}\nimport json, sys\nwith open('{folder}/calls', 'a') as file:\n"
                               f"    print(json.dumps(sys.argv[1:]), file=file)\nsys.exit({PREEMPTED})\n")
    (folder / path).chmod(0o755)


def test_the_run_gets_its_arguments_as_they_are_and_gives_its_code(task, tmp_path):
    record(tmp_path, "marjax/bin/marjax")
    environment = {**os.environ, "HOME": str(tmp_path), **task["envs"], "WORKDIR": "gs://bucket/a b",
                   "ARGUMENTS": "--config.data.data_dir='a b,c=d' --config.seed=1"}
    ended = subprocess.run(["bash", "-c", task["run"]], env=environment)
    assert ended.returncode == PREEMPTED
    assert json.loads((tmp_path / "calls").read_text()) == [
        "train", "--config", task["envs"]["CONFIG"], "--workdir", "gs://bucket/a b",
        "--config.data.data_dir=a b,c=d", "--config.seed=1"]


def test_a_failing_setup_is_told(task, tmp_path):
    record(tmp_path, "bin/python3")
    ended = subprocess.run(["bash", "-c", task["setup"]],
                           env={**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    assert ended.returncode == PREEMPTED  # the stand-in's, of the first line
    assert (tmp_path / "calls").read_text().count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not (importlib.util.find_spec("sky") or "MARJAX_TEST_SKYPILOT" in os.environ),
                    reason=f"{SKYPILOT} takes 450 MB: set MARJAX_TEST_SKYPILOT=1 to have it installed in .cache/")
def test_skypilot_takes_it(tmp_path):
    """Offline: no cloud is asked."""
    python = sys.executable if importlib.util.find_spec("sky") else tool_venv("skypilot", [SKYPILOT]) / "python"
    code = ("import json, sys, sky\n"
            "config = sky.utils.yaml_utils.read_yaml(sys.argv[1])\n"
            "task = sky.Task.from_yaml_config(config, env_overrides=[('WORKDIR', 'gs://bucket/run')])\n"
            "[resources] = task.resources\n"
            "print(json.dumps([task.name, resources.accelerators, resources.use_spot, resources.job_recovery,\n"
            "                  task.envs['WORKDIR'], str(resources.cloud)]))\n"
            "try:\n    sky.Task.from_yaml(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n")
    ended = subprocess.run([python, "-c", code, FILE], capture_output=True, text=True,
                           env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"})
    assert not ended.returncode, ended.stderr
    made, refused = ended.stdout.strip().splitlines()[:2]
    expected = yaml.safe_load(FILE.read_text())["resources"]
    assert json.loads(made) == ["marjax", {expected["accelerators"]: 1}, True, expected["job_recovery"],
                                "gs://bucket/run", "GCP"]
    assert "WORKDIR" in refused
