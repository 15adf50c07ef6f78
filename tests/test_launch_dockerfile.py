"""launch/Dockerfile, which no engine builds here: its instructions, and a rehearsal of the build in a folder."""

import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
from support.paths import ROOT

INSTRUCTIONS = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}


def instructions():
    """(instruction, rest) of every one, in order, without comments and continuations."""
    text = re.sub(r"\\\n", " ", (ROOT / "launch" / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def sources(rest):
    """(files and folders, destination) of a COPY."""
    *given, destination = [word for word in rest.split() if not word.startswith("--")]
    return given, destination


def is_in_context(path):
    """Whether .dockerignore lets a path through: the last line that fits decides; a folder stands for what it has."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, keeps = line.removeprefix("!"), line.startswith("!")
        names = [path, *map(str, pathlib.PurePath(path).parents)][:-1] or [path]
        if any(
            fnmatch.fnmatchcase(name, pattern)
            or (pattern.startswith("**/") and fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], pattern[3:]))
            for name in names
        ):
            kept = keeps
    return kept


def test_the_instructions_are_docker_s():
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS and found[0] == ("FROM", "python:3.12-slim")
    for name, rest in found:
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)  # as JSON, so that signals reach the program and no shell
    assert ("ENTRYPOINT", '["marjax"]') in found
    args = {rest.split("=")[0] for name, rest in found if name == "ARG"}
    used = {match for _, rest in found for match in re.findall(r"\$\{(\w+)\}", rest)}
    assert used == args  # nothing is used that is not declared


def test_dockerignore_keeps_what_is_copied_and_no_more():
    copied = [source for name, rest in instructions() if name == "COPY" for source in sources(rest)[0]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists() and is_in_context(source), source
    assert is_in_context("marjax/training/train.py") and not is_in_context("marjax/__pycache__/cli.cpython-312.pyc")
    for path in (
        ".git",
        ".git/config",
        ".venv-test/bin/python",
        "runs/a/config.json",
        "tests/conftest.py",
        ".cache/jax/x",
    ):
        assert not is_in_context(path), path


def test_the_image_runs_as_a_user_who_may_write_where_marjax_writes(tmp_path):
    found = instructions()
    arguments = dict(rest.split("=") for name, rest in found if name == "ARG")
    [user] = [re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest) for name, rest in found if name == "USER"]
    names = [name for name, _ in found]
    assert user not in ("root", "0") and names.index("USER") < names.index("ENTRYPOINT")
    # The instruction that makes the user, with stand-ins for what only root can do, in a folder in place of /.
    [script] = [rest for name, rest in found if name == "RUN" and "useradd" in rest]
    assert re.search(rf"useradd\b[^&]*\b{user}\b", script)
    for name in ("home/marjax", "app"):
        (tmp_path / name).mkdir(parents=True, mode=0o755)
    for name in ("useradd", "chown"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    script = re.sub(r"(?<=\s)/(?=\w)", f"{tmp_path}/", script)
    subprocess.run(
        ["sh", "-euc", script], check=True, cwd=tmp_path / "app", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )
    settings = dict(part.split("=") for name, rest in found if name == "ENV" for part in rest.split())
    folders = [settings["HOME"], settings["JAX_COMPILATION_CACHE_DIR"], "/app", "/app/runs"]
    assert ("WORKDIR", "/app") in found
    for folder in folders:  # by anybody: a pod may name another user
        assert (tmp_path / folder[1:]).stat().st_mode & 0o007 == 0o007, folder


@pytest.mark.slow
def test_what_is_copied_makes_the_package(tmp_path):
    """The COPY instructions in a folder, where their RUN instructions' pip would be: a wheel with every module."""
    for name, rest in instructions():
        if name == "COPY":
            given, destination = sources(rest)
            for source in given:
                to = tmp_path / destination
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, to)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "--wheel-dir",
            tmp_path / "wheels",
            tmp_path,
        ],
        check=True,
    )
    [wheel] = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("marjax/") and name.endswith(".py")}
        [points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "marjax = marjax.__main__:main" in archive.read(points).decode()
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        extras = re.findall(r"Provides-Extra: (\S+)", archive.read(metadata).decode())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "marjax").rglob("*.py")}
    modules |= {f"marjax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert packed == modules
    wanted = next(rest for name, rest in instructions() if name == "ARG" and rest.startswith("EXTRAS=")).split("=")[1]
    assert set(wanted.split(",")) <= set(extras)
    run = " ".join(rest for name, rest in instructions() if name == "RUN")
    assert '".[${EXTRAS}]"' in run and "--no-deps ." in run and shlex.split(run)
