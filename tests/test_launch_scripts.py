"""All scripts: they parse, shellcheck has nothing to say, and `-h` prints their header."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest
from support.paths import ROOT

SCRIPTS = sorted(
    path
    for pattern in ("launch/*.sh", "launch/*.sbatch", ".ci/*")
    for path in ROOT.glob(pattern)
    if path.suffix != ".py" and path.is_file()
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", script], check=True)


def header(script):
    """The comment, or the docstring, that a script begins with."""
    text = script.read_text()
    if script.suffix == ".py":
        return ast.get_docstring(ast.parse(text), clean=False)
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
    return "\n".join(line[2:] for line in lines if line.startswith("# ") or line == "#")


@pytest.mark.parametrize(
    "script",
    sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("launch/*.py")]),
    ids=lambda path: path.name,
)
def test_help_prints_the_header_and_does_nothing_else(script, tmp_path):
    program = sys.executable if script.suffix == ".py" else "bash"
    texts = []
    for flag in ("-h", "--help")[: 1 if script.name == "table1_small.py" else 2]:  # which imports JAX
        done = subprocess.run(
            [program, script, flag],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert not done.returncode and not done.stderr and not os.listdir(tmp_path)
        texts.append(done.stdout)
    assert texts[0] == texts[-1] and header(script).strip() in texts[0] and len(header(script)) > 50


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed: .ci/packages.sh does it")
def test_shellcheck_has_nothing_to_say(tmp_path):
    checked = subprocess.run(["shellcheck", "--external-sources", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert not checked.returncode, checked.stdout
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    assert subprocess.run(["shellcheck", tmp_path / "bad.sh"], capture_output=True).returncode


def test_what_is_started_can_be_started():
    # A sourced script needs no right to run.
    assert not [path.name for path in SCRIPTS if path.name != "venv.sh" and not path.stat().st_mode & 0o100]


def test_nothing_is_left_to_fill_in():
    """What a reader would have to replace is an argument or a variable instead."""
    files = [
        path
        for pattern in ("*.md", "docs/*.md", "launch/*", "configs/*.py", "marjax/**/*.py")
        for path in ROOT.glob(pattern)
        if path.is_file()
    ]
    assert len(files) > 100
    placeholder = re.compile(r"\bYOUR[-_]\w+|<your\b|github\.com/(OWNER|USER|ORG)\b|\b0{6}-0{6}-0{6}\b", re.IGNORECASE)
    assert not [(path.name, found[0]) for path in files if (found := placeholder.search(path.read_text("utf-8")))]
