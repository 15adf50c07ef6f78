"""docs/pods.md, docs/launchers.md and launch/imagenet_latents.sh, with stand-ins for the programs that they call."""

import json
import os
import re
import subprocess
import sys

import pytest
from support.gcloud import unknown
from support.launchers import XPK, XPK_ITSELF, tool_venv
from support.paths import ROOT

from marjax import config as config_lib
from marjax.cli import parse

TEXT = "".join((ROOT / "docs" / name).read_text() for name in ("pods.md", "launchers.md"))
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LAUNCHERS = ("launch/tpu_vm.sh", "launch/gke.sh")

# Appends its name and arguments, and of its variables those that count, to the file `calls`.
RECORD = f"""#!{sys.executable}
import json, os, pathlib, sys
name = os.environ["AS"] if "AS" in os.environ else pathlib.Path(sys.argv[0]).name
given = {{key: os.environ.get(key, "") for key in ("NAME", "TYPE", "CREATE_FLAGS", "FETCH")}}
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([[name, *sys.argv[1:]], given]), file=file)
if "value(projectNumber)" in " ".join(sys.argv):
    print(123)
if sys.argv[1:4] == ["billing", "accounts", "list"]:
    print("012345-6789AB-CDEF01")
"""


def stand_in(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(RECORD)
        (folder / name).chmod(0o755)


def recorded(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """What the blocks call: (arguments, variables) of each, and the number of its block."""
    folder = tmp_path_factory.mktemp("typed")
    stand_in(folder / "launch", "tpu_vm.sh", "gke.sh")
    stand_in(folder / "bin", "gcloud", "marjax", "pip", "python3", "xpk", "sky", "tensorboard")
    # `source .venv/bin/activate`, of a virtual environment that python3 does not make here; xpk's has a pip of its own.
    blocks = [
        block.replace("source .venv/bin/activate", "true").replace(".venv-xpk/bin/pip", "pip") for block in BLOCKS
    ]
    script = "set -eu\n" + "".join(f"export CALLS={folder}/calls{i}\n{block}\n" for i, block in enumerate(blocks))
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "USER": "ada"},
    )
    assert not ran.returncode, ran.stderr
    return [(*call, i) for i in range(len(blocks)) for call in recorded(folder / f"calls{i}")]


def inner(arguments):
    """What a launcher is to run, or the arguments themselves."""
    if arguments[0] in ("tpu_vm.sh", "gke.sh"):
        for action in ("run", "keep", "create"):
            if action in arguments:
                return arguments[arguments.index(action) + 1 :]
    return arguments


def test_marjax_takes_its_commands(typed):
    commands = [inner(arguments) for arguments, _, _ in typed]
    commands = [
        command[1:] if command[0] == "marjax" else command[2:]
        for command in commands
        if command and command[0] in ("marjax", "env") and "marjax" in command
    ]
    assert {command[0] for command in commands} == {"compile", "convert", "train", "evaluate"}
    for command in commands:
        given, overrides = parse(command)
        if command[0] in ("train", "compile"):
            config_lib.apply_overrides(config_lib.load(str(ROOT / given.config)), overrides)
        else:
            assert not overrides


def test_what_the_hosts_read_was_put_there(typed):
    """The bucket's data/ becomes ~/data, beside ~/marjax, where the commands run."""
    uploads = [arguments for arguments, _, _ in typed if arguments[:3] == ["gcloud", "storage", "cp"]]
    there = {os.path.basename(name) for upload in uploads if upload[-1] == "gs://marjax-ada/data/" for name in upload}
    there |= {"imagenet_kl16", "kl16.safetensors"}  # of launch/imagenet_latents.sh: see below
    runs = [
        (arguments, given)
        for arguments, given, _ in typed
        if arguments[0] == "tpu_vm.sh" and {"train", "evaluate"} & set(arguments)
    ]
    assert len(runs) == 3
    for arguments, given in runs:
        read = [word.rpartition("=")[2] for word in arguments if "../data" in word]
        assert len(read) == 2 and all(re.fullmatch(r"\.\./data/(\w|\.)+", path) for path in read)
        assert {os.path.basename(path) for path in read} <= there
        assert (given["FETCH"], given["TYPE"]) == ("gs://marjax-ada/data", "v5litepod-64")
    [encode] = [(arguments, given) for arguments, given, _ in typed if "launch/imagenet_latents.sh" in arguments]
    assert encode[0][-1] == "gs://marjax-ada" and encode[1]["FETCH"] == ""
    assert encode[1]["CREATE_FLAGS"].split() == [
        "--internal-ips",
        "--data-disk=source=projects/marjax-ada/zones/us-west4-a/disks/imagenet,mode=read-write",
    ]
    raw = {os.path.basename(name) for upload in uploads if upload[-1] == "gs://marjax-ada/raw/" for name in upload}
    assert {"ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "kl16.ckpt"} <= raw


def test_nothing_is_deleted_in_the_block_that_uses_it(typed):
    """`run` returns at once."""
    deleting = {i for arguments, _, i in typed if arguments[-1] == "delete"}
    starting = {i for arguments, _, i in typed if {"run", "keep"} & set(arguments)}
    assert len(deleting) == 2 and not deleting & starting


def test_gcloud_knows_its_commands(typed):
    assert unknown(["storage", "cp", "--recursiv", "a"]) == {"--recursiv"} and unknown(["storage", "cpp"])
    calls = [arguments[1:] for arguments, _, _ in typed if arguments[0] == "gcloud"]
    assert len(calls) > 20
    assert not [(call, unknown(call)) for call in calls if unknown(call)]


@pytest.mark.slow
def test_xpk_knows_its_commands(typed):
    xpk = tool_venv("xpk", XPK, XPK_ITSELF) / "xpk"
    calls = [arguments for arguments, _, _ in typed if arguments[0] == "xpk"]
    assert [call[1:3] for call in calls] == [["cluster", "create"], ["storage", "attach"]]
    for call in calls:
        text = subprocess.run([xpk, *call[1:3], "--help"], capture_output=True, text=True, check=True).stdout
        flags = {word.split("=")[0] for word in call if word.startswith("--")}
        assert flags and not {flag for flag in flags if not re.search(rf"{flag}\b", text)}


def test_the_launchers_of_the_page_are_there():
    for name in re.findall(r"launch/[\w.]+", TEXT):
        assert (ROOT / name).exists(), name
    assert all(os.access(ROOT / name, os.X_OK) for name in LAUNCHERS)


@pytest.mark.parametrize(("found", "formatted"), [("\n", True), ("ext4 \n", False), ("\n gpt-part\n", False)])
def test_the_latents_of_imagenet(tmp_path, found, formatted):
    """An empty disk is formatted, another is taken as it is; and all is done in it, in this order."""
    stand_in(tmp_path / "bin", "gcloud", "marjax")
    disk = tmp_path / "disk"
    (tmp_path / "bin" / "lsblk").write_text(f"#!/bin/bash\nprintf '{found}'\n")
    (tmp_path / "bin" / "mountpoint").write_text('#!/bin/bash\n[[ -e "$2/mounted" ]]\n')
    (tmp_path / "bin" / "sudo").write_text(
        '#!/bin/bash\necho "$@" >>"$HOME/sudo"\ncase $1 in\nmkdir) "$@" ;;\nmount) touch "$3/mounted" ;;\nesac\n'
    )
    for name in ("lsblk", "mountpoint", "sudo"):
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "FOLDER": str(disk),
    }
    command = [ROOT / "launch" / "imagenet_latents.sh", "gs://bucket/", "/dev/disk"]
    for _ in range(2):  # the second start finds it mounted
        subprocess.run(command, env=environment, check=True)
    asked = (tmp_path / "sudo").read_text().splitlines()
    assert ("mkfs.ext4 -q /dev/disk" in asked) == formatted
    assert [line.split()[0] for line in asked if "mkfs" not in line] == ["mkdir", "mount", "chown"]

    calls = [arguments for arguments, _ in recorded(tmp_path / "calls")]
    assert calls[:5] == calls[5:]
    fetch, prepare, convert, encode, send = calls[:5]
    assert fetch[-2:] == ["gs://bucket/raw/*", "raw/"] and send[-3:] == [
        "imagenet_kl16",
        "kl16.safetensors",
        "gs://bucket/data/",
    ]
    tars = ["raw/ILSVRC2012_img_train.tar", "raw/ILSVRC2012_img_val.tar"]
    assert parse(prepare[1:])[0].imagenet == tars
    assert parse(convert[1:])[0].out == "kl16.safetensors"
    given, overrides = parse(encode[1:])
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    assert (given.out, config.data.data_dir, config.tokenizer.path) == ("imagenet_kl16", "data", "kl16.safetensors")


def test_a_bucket_is_needed():
    ended = subprocess.run([ROOT / "launch" / "imagenet_latents.sh", "bucket"], capture_output=True, text=True)
    assert ended.returncode == 2 and "usage: launch/imagenet_latents.sh gs://BUCKET" in ended.stderr
