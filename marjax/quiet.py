"""Keeps what libtpu prints on machines without a TPU off the terminal, by the variables that it asks for."""

import glob
from collections.abc import MutableMapping

# What libtpu would ask the machine for, and report as missing; and how much it prints.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # of TPUs, and maybe of others


def quiet_libtpu(environment: MutableMapping[str, str], root: str = "") -> None:
    """Sets LIBTPU in environment variables, before JAX is imported, where this machine cannot have a TPU.

    Nothing is set where a device may be a TPU or a variable of libtpu is set already, and JAX chooses its platform as
    before.

    Args:
      environment: such as `os.environ`.
      root: of the file system.
    """
    has_device = any(glob.glob(root + pattern) for pattern in _DEVICES)
    if has_device and LIBTPU.items() <= environment.items():  # of the machine that has submitted this job
        for name in LIBTPU:
            del environment[name]
    told = any(name.startswith(("TPU_", "JAX_FORCE_TPU_INIT", "COLAB_TPU")) for name in environment)
    if not told and not has_device:
        environment.update(LIBTPU)
