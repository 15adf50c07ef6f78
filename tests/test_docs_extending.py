"""Runs all code of docs/extending.md in order, with fewer steps."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from support.paths import ROOT

from marjax import registry
from marjax.cli import main

BLOCKS = re.findall(
    r"^```(\w*)\n(.*?)^```$", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
QUICKER = {
    "steps=400": "steps=2",
    "steps=500": "steps=3",
    "every=50": "every=1",
    "encoder_depth=2": "encoder_depth=1",
    "decoder_depth=2": "decoder_depth=1",
    "num_iter=16": "num_iter=4",
}


@pytest.fixture
def fresh(monkeypatch):
    """An empty registry."""
    monkeypatch.setattr(registry, "_registered", {kind: {} for kind in registry.KINDS})
    monkeypatch.setattr(registry, "_loaded", set())


def test_the_page(tmp_path, monkeypatch, fresh):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    files, commands, code = [], [], []
    for kind, text in BLOCKS:
        for long, short in QUICKER.items():
            text = text.replace(long, short)
        if kind == "python" and (named := re.match(r"# (\w+\.py)\n", text)):
            (tmp_path / named[1]).write_text(text, encoding="utf-8")
            files.append(named[1])
        elif kind == "python":
            code.append(text)
        elif kind == "":
            commands += text.splitlines()
    assert len(files) == 4 and len(code) == 3 and len(commands) == 4

    for command in commands:
        program, *arguments = shlex.split(command.replace("$PWD", str(tmp_path)))
        if program == "export":
            monkeypatch.setenv(*arguments[0].split("=", 1))
        elif arguments[0] == "sample":  # in a process that finds the head only through the environment
            subprocess.run([sys.executable, "-P", "-m", "marjax", *arguments], check=True)
        else:
            assert program == "marjax" and main(arguments) == 0
    assert np.load("laplace/samples.npz")["images"].shape == (10, 8, 8, 1)
    assert os.path.isdir("runs/laplace/checkpoints/3")

    namespace = {}
    for text in code:
        exec(compile(text, "extending.md", "exec"), namespace)
    assert namespace["history"].keys() == {1, 2}
