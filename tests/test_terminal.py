"""Commands work on terminals and in locales with only ASCII."""

import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from support.paths import ROOT

import marjax

TERMINALS = [
    {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "1"},
]


@pytest.fixture(params=TERMINALS, ids=["locale", "terminal"])
def run(request, tmp_path):
    """Runs Python with these arguments in a new folder; returns its code, stdout and stderr."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GLIBC_TUNABLES", "PYTHONUTF8") and not name.startswith("LC_")
    }

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            capture_output=True,
            env={**kept, "PYTHONPATH": str(ROOT), **request.param},
        )
        return done.returncode, done.stdout.decode("ascii"), done.stderr.decode("ascii")

    return run


def test_a_command_prints_and_writes_non_ascii_names(run, tmp_path):
    for name in ("pictures-é/plum-é", "pictures-é/花"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / name / "ä.png")
    code, out, err = run("-m", "marjax", "prepare", "--images", "pictures-é", "--out", "data-ü", "--workers", "1")
    assert code == 0, err
    assert "data-\\xfc" in out + err
    [labels] = (tmp_path / "data-ü").rglob("label.labels.txt")
    assert labels.read_text("utf-8").split() == ["plum-é", "花"]


def test_errors_are_printed_as_ascii(run):
    code, _, err = run("-m", "marjax", "train", "--config", "zahlen-ß.py", "--workdir", "run")
    assert code == 2 and "zahlen-\\xdf.py" in err and err.count("\n") == 1


def test_the_local_launcher_prints_the_output_of_its_processes(run):
    code, out, err = run(
        ROOT / "launch" / "local.py",
        "--processes",
        "1",
        "--devices",
        "1",
        "--",
        sys.executable,
        "-c",
        "import sys; sys.stdout.buffer.write(bytes([0xc3, 0xa4, 10]))",
    )
    assert (code, out, err) == (0, "[0] \\xe4\n", "")


def test_the_version_needs_no_device(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "marjax", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "none"},
        check=True,
    )
    [line] = done.stdout.splitlines()
    assert line.startswith(f"marjax {marjax.__version__} (Python {platform.python_version()}, jax {jax.__version__}")
