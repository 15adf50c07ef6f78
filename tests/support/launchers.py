"""Virtual environments for tools that launchers call and that do not fit into marjax's own, kept in .cache/."""

import fcntl
import hashlib
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest
from support.paths import ROOT


def tool_venv(name: str, requirements: Sequence[str], no_deps: Sequence[str] = ()) -> pathlib.Path:
    """The folder of programs of a virtual environment with `requirements`, and `no_deps` without what they ask for.

    Made on the first call. Skips the test, saying why, where pip cannot get them.
    """
    digest = hashlib.sha256(repr((sys.version, requirements, no_deps)).encode()).hexdigest()[:8]
    folder = ROOT / ".cache" / "launchers" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes want the same
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
            # Not compiling what is never imported takes half the time off.
            pip = [
                sys.executable,
                "-m",
                "pip",
                "--python",
                str(folder / "bin" / "python"),
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-compile",
            ]
            for arguments in [[*pip, "--no-deps", *no_deps]] * bool(no_deps) + [[*pip, *requirements]]:
                installed = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
                if installed.returncode:
                    why = (installed.stderr.strip().splitlines() or ["pip failed"])[-1]
                    pytest.skip(f"{name} cannot be installed here: {why}")
            (folder / "complete").touch()
    return folder / "bin"


# What `xpk workload create` and `delete` and the manifest need; all that xpk asks for takes three times as long.
XPK = [
    "argcomplete==3.6.3",
    "docker==7.1.0",
    "google-api-core[grpc]==2.24.1",
    "google-cloud-storage",
    "google-cloud-filestore==1.12.0",
    "google-cloud-resource-manager",
    "Jinja2",
    "kubernetes==35.0.0",
    "packaging==24.2",
    "ruamel.yaml==0.18.10",
    "tabulate==0.9.0",
    "pyyaml",
    "urllib3<2.6",
    "kubernetes-validate==1.37.0",
]
XPK_ITSELF = ["xpk==1.16.0", "setuptools_scm==10.2.1", "vcs-versioning==2.2.2"]
