"""All shell scripts: they parse, and shellcheck has nothing to say."""

import shutil
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = sorted(path for pattern in ("launch/*.sh", "launch/*.sbatch", ".ci/*") for path in ROOT.glob(pattern)
                 if path.suffix != ".py")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed: .ci/packages.sh does it")
def test_shellcheck_has_nothing_to_say(tmp_path):
    checked = subprocess.run(["shellcheck", "--external-sources", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert not checked.returncode, checked.stdout
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    assert subprocess.run(["shellcheck", tmp_path / "bad.sh"], capture_output=True).returncode


def test_what_is_started_can_be_started():
    # A sourced script needs no right to run.
    assert not [path.name for path in SCRIPTS if path.name != "venv.sh" and not path.stat().st_mode & 0o100]
