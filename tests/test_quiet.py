"""libtpu is silent where there is no TPU, and left alone where there may be one."""

import os
import subprocess
import sys

import pytest

from marjax.quiet import LIBTPU, quiet_libtpu


@pytest.mark.parametrize(
    "device, given, sets",
    [
        (None, {}, True),
        (None, {"JAX_PLATFORMS": "cpu"}, True),
        ("accel0", {}, False),
        ("vfio/0", {}, False),
        (None, {"TPU_WORKER_HOSTNAMES": "a,b"}, False),
        (None, {"TPU_STDERR_LOG_LEVEL": "0"}, False),
    ],
)
def test_variables_are_set_only_without_a_tpu(tmp_path, device, given, sets):
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "vfio").touch()  # of the driver, there without a device too
    if device is not None:
        (tmp_path / "dev" / device).touch()
    environment = dict(given)
    quiet_libtpu(environment, str(tmp_path))
    assert environment == (given | LIBTPU if sets else given)
    environment = given | LIBTPU  # inherited by a job
    quiet_libtpu(environment, str(tmp_path))
    assert environment == ({} if device else given | LIBTPU)


@pytest.mark.skipif(bool(os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")), reason="there may be a TPU")
def test_a_process_with_libtpu_starts_without_its_lines():
    pytest.importorskip("libtpu")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS"))}
    # So that libtpu is loaded whether or not another process has it, as it is on a machine of one user.
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    said = []
    for first in ("", "import os; from marjax.quiet import quiet_libtpu; quiet_libtpu(os.environ); "):
        done = subprocess.run(
            [sys.executable, "-P", "-c", first + "import jax; print(jax.devices()[0].platform)"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stderr)
    assert "TPU" in said[0] and said[1] == ""
