"""launch/gke.sh: what it asks of xpk, the JobSet that the real xpk makes of it, and what that does in a pod."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from support.launchers import XPK, XPK_ITSELF, tool_venv
from support.paths import ROOT

from marjax.errors import LOST_PEER, PREEMPTED

yaml = pytest.importorskip("yaml", reason="PyYAML comes with flax")

LAUNCHER = str(ROOT / "launch" / "gke.sh")
SETTINGS = {
    "PROJECT": "proj",
    "ZONE": "us-east5-b",
    "CLUSTER": "tpus",
    "NAME": "mar",
    "TYPE": "v5litepod-16",
    "IMAGE": "us-docker.pkg.dev/proj/images/marjax:1",
}
ODD = [
    "train",
    "--config",
    "configs/x.py:model=mar_base,variant=ar",
    "--config.data.data_dir=a b/c,d=e",
    "--x=$HOME `id`",
    'it\'s "quoted" \\ {x} {{y}} %s *',
    "two\nlines",
    "",
    "- |: #&!~",
    "a  b",
]


def launch(path, *arguments, fails=0, **settings):
    ended = subprocess.run(
        [LAUNCHER, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}", **SETTINGS, **settings},
    )
    assert ended.returncode == fails, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture
def recorder(tmp_path):
    """A folder with stand-ins for xpk and docker, which write their arguments to the file `calls`."""
    for name in ("xpk", "docker"):
        (tmp_path / name).write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"with open('{tmp_path}/calls', 'a') as file:\n"
            f"    print(json.dumps(['{name}', *sys.argv[1:]]), file=file)\n"
        )
        (tmp_path / name).chmod(0o755)
    (tmp_path / "calls").touch()
    return tmp_path


def calls(recorder):
    return [json.loads(line) for line in (recorder / "calls").read_text().splitlines()]


def test_what_is_asked_of_xpk(recorder):
    launch(recorder, "create", "marjax", *ODD, SPOT="1", SLICES="2", MAX_RESTARTS="7", STORAGE="data")
    launch(recorder, "list")
    launch(recorder, "delete")
    create, *others = calls(recorder)
    where = ["--project=proj", "--zone=us-east5-b", "--cluster=tpus"]
    assert create[:3] == ["xpk", "workload", "create"] and set(where) < set(create)
    assert {"--spot", "--storage=data", "--num-slices=2", "--max-restarts=7", "--tpu-type=v5litepod-16"} < set(create)
    assert "--dry-run" not in create
    assert others == [["xpk", "workload", "list", *where], ["xpk", "workload", "delete", *where, "--workload=mar"]]


def test_build_makes_and_pushes_the_image(recorder):
    launch(recorder, "build", "--build-arg=EXTRAS=cuda13,gcs")
    build, push = calls(recorder)
    assert build == [
        "docker",
        "build",
        "--platform=linux/amd64",
        "--file=launch/Dockerfile",
        f"--tag={SETTINGS['IMAGE']}",
        "--build-arg=RUN_AS=root",
        "--build-arg=EXTRAS=cuda13,gcs",
        ".",
    ]
    assert push == ["docker", "push", SETTINGS["IMAGE"]]


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        ([], {}, "say what to do"),
        (["start"], {}, "unknown action start"),
        (["create"], {}, "no command, such as"),
        (["render"], {}, "render needs a file"),
        (["create", "true"], {"TYPE": ""}, "no TYPE: set it"),
        (["delete"], {"NAME": ""}, "no NAME: set it"),
        (["create", "true"], {"NAME": "My_run"}, "NAME is 'My_run': give"),
    ],
)
def test_slips_are_told_before_anything_is_asked_for(recorder, arguments, settings, said):
    assert f"launch/gke.sh: error: {said}" in launch(recorder, *arguments, fails=2, **settings)
    assert not calls(recorder)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The manifest that the real xpk writes, without a cluster or an account; and the folder of xpk's programs."""
    xpk = tool_venv("xpk", XPK, XPK_ITSELF)
    folder = tmp_path_factory.mktemp("gke")
    launch(xpk, "render", folder / "m.yaml", "marjax", *ODD, SLICES="2", HOME=str(folder), CLOUDSDK_CONFIG=str(folder))
    return yaml.safe_load((folder / "m.yaml").read_text()), xpk


def pod_of(manifest):
    [replicated] = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


@pytest.mark.slow
def test_the_manifest_says_what_is_meant(rendered):
    manifest, _ = rendered
    assert manifest["kind"] == "JobSet" and manifest["metadata"]["name"] == "mar"
    spec = manifest["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 100
    [replicated] = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    # v5litepod-16 is 4 x 4 chips, four on each of four machines; two such slices.
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    pod = pod_of(manifest)
    [container] = pod["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["image"] == SETTINGS["IMAGE"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
    # One pod's end ends its Job (backoffLimit 0), and the JobSet starts again; but not after any other exit code, for
    # which the Job fails by the pod failure policy, and that fails the JobSet.
    assert job["backoffLimit"] == 0
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    retried = set(rule["onExitCodes"]["values"])
    assert {PREEMPTED, LOST_PEER, 137, 139, 143} <= retried and not {0, 1, 2} & retried
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]


@pytest.mark.slow
def test_kubernetes_would_take_the_job(rendered, tmp_path):
    """The Job in the JobSet, against Kubernetes' own schema; the JobSet's is not published with it."""
    manifest, xpk = rendered
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "mar"}, "spec": replicated["template"]["spec"]}

    def validate(job):
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        return subprocess.run(
            [xpk / "python", "-m", "kubernetes_validate", "--strict", tmp_path / "job.yaml"],
            capture_output=True,
            text=True,
        )

    checked = validate(job)
    assert not checked.returncode, checked.stdout + checked.stderr
    job["spec"]["backofLimit"] = job["spec"].pop("backoffLimit")
    assert validate(job).returncode


@pytest.mark.slow
@pytest.mark.parametrize("end", ["0", "1", "2", "134", "SIGTERM", "missing"])
def test_the_pod_runs_the_command_and_ends_with_its_code(rendered, tmp_path, end):
    """xpk's wrapper around it, run here: the arguments are what was given, and SIGTERM arrives as in a preemption.

    A program that is not there is a slip, not 127, after which xpk would start it again and again.
    """
    [container] = pod_of(rendered[0])["containers"]
    program, flag, script = container["command"]
    assert (program, flag) == ("bash", "-c")
    (tmp_path / "marjax").write_text(
        f"#!{sys.executable}\n"
        + """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(42)))
with open("partial", "w") as file:
    json.dump(sys.argv[1:], file)
os.rename("partial", "arguments")
if os.environ["END"] != "SIGTERM":
    sys.exit(int(os.environ["END"]))
time.sleep(60)
"""
    )
    (tmp_path / "marjax").chmod(0o755)
    if end == "missing":
        (tmp_path / "marjax").unlink()
    script, quicker = re.subn(r"sleep \d+", "sleep 0.1", script)
    assert quicker == 1  # what it waits between looks at the program
    path = os.pathsep.join(
        [
            str(tmp_path),
            *(
                folder
                for folder in os.environ["PATH"].split(os.pathsep)
                if not os.path.exists(os.path.join(folder, "marjax"))
            ),
        ]
    )
    pod = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path, "END": end},
    )
    if end == "missing":
        output, _ = pod.communicate(timeout=60)
        assert pod.returncode == 2 and "there is no program marjax" in output
        return
    deadline = time.monotonic() + 60
    while not (tmp_path / "arguments").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if end == "SIGTERM":
        pod.send_signal(signal.SIGTERM)
    output, _ = pod.communicate(timeout=60)
    assert json.loads((tmp_path / "arguments").read_text()) == ODD
    assert pod.returncode == (PREEMPTED if end == "SIGTERM" else int(end)), output
