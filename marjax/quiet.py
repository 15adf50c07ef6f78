"""Silences libtpu on machines without a TPU, through its environment variables."""

import glob
from collections.abc import MutableMapping

# What libtpu would query and report as missing, and its log levels.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # TPUs, and perhaps other devices


def quiet_libtpu(environment: MutableMapping[str, str], root: str = "") -> None:
    """Sets the variables LIBTPU before JAX is imported, if this machine cannot have a TPU.

    Does nothing if a device may be a TPU or a variable of libtpu is already set.

    Args:
      environment: the variables, such as `os.environ`.
      root: root of the file system.
    """
    has_device = any(glob.glob(root + pattern) for pattern in _DEVICES)
    if has_device and LIBTPU.items() <= environment.items():  # inherited from the machine that submitted this job
        for name in LIBTPU:
            del environment[name]
    is_set = any(name.startswith(("TPU_", "JAX_FORCE_TPU_INIT", "COLAB_TPU")) for name in environment)
    if not is_set and not has_device:
        environment.update(LIBTPU)
