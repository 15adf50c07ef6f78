"""Explains failures of the machine (memory, disk, limits) in one line."""

import errno
import functools
import os
import re
import sys
import traceback
import warnings
from typing import Any

from marjax.errors import TrainingError, shortened
from marjax.host_memory import gib, host_available

TRACEBACK = "MARJAX_TRACEBACK"  # if set, commands print tracebacks too

_PATH = "check the path"
_ADVICE = {
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files (sysctl fs.file-max)",
    errno.ENOSPC: "make room there, or give another folder",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EFBIG: "allow larger files (ulimit -f), or give another folder",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give yourself access, or give another path",
    errno.EPERM: "give yourself access, or give another path",
    errno.ENOENT: "it is missing, or was removed meanwhile: check the path",
    errno.ENOTDIR: _PATH,
    errno.EISDIR: _PATH,
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: _PATH,
    errno.ESTALE: "start the same command again",
    errno.EIO: "check the disk",
    errno.ENOMEM: "free memory, or use a smaller batch",
    errno.EAGAIN: "allow more processes (ulimit -u)",
}
# Errors after which a file may still be intact.
_PASSING = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ENOSPC,
    errno.EROFS,
)


# How to reduce the memory of each command.
_LOWER = {
    "train": "lower config.train.batch_size, or raise config.train.accumulate",
    "sample": "lower --batch_size",
    "evaluate": "lower --batch_size",
    "cache-latents": "lower --batch_size",
    "stats": "lower --batch_size or --keep_features",
    "train-tokenizer": "lower config.tokenizer.train.batch_size, or set config.tokenizer.train.remat=true",
    "train-classifier": "use fewer images (config.data.split)",
    "prepare": "lower --workers",
    "benchmark": "lower config.train.batch_size or config.sample.batch_size",
    "tokenizer": "lower --num_images or --image_size",
}


def explain(error: BaseException, command: str = "") -> TrainingError | None:
    """The error to report for a failure of the machine; None for any other error.

    Args:
      error: any exception.
      command: the command that raised it, such as "train".
    """
    if _is_of_memory(error):
        device = "" if isinstance(error, MemoryError) else " on the device"
        detail = shortened(" ".join(str(error).split()), 160)
        return TrainingError(
            f"out of memory{device}{f' ({detail})' if detail else ''}; "
            f"{gib(max(host_available(), 0.0))} of host memory is available now; "
            f"{_LOWER.get(command, 'use a smaller batch')}, or use more devices or memory"
        )
    if isinstance(error, RecursionError):
        return TrainingError(
            f"too deep recursion ({shortened(str(error))}); simplify the config or file, or set {TRACEBACK}=1 to see "
            f"where"
        )
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return TrainingError("cannot start more threads; allow more processes (ulimit -u)")
    if isinstance(error, RuntimeError | AssertionError) and _is_of_backend(error):
        detail = shortened(" ".join(str(error).split()), 160)
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return TrainingError(
            f"JAX finds no devices for JAX_PLATFORMS={platforms}{f' ({detail})' if detail else ''}; set it to one "
            f"of this machine, such as cpu, or install JAX for it{_installs(platforms)}"
        )
    code = error_number(error)
    if code is None:
        return None
    names = [
        os.fsdecode(each)
        for each in (getattr(error, "filename", None), getattr(error, "filename2", None))
        if isinstance(each, str | bytes)
    ]
    where = f"{shortened(' -> '.join(names), 300)}: " if names else ""
    return TrainingError(f"{where}{os.strerror(code)}; {_ADVICE.get(code, _PATH)}")


def _installs(platforms: str) -> str:
    """: " and the command that installs JAX for an accelerator; "" if no extra of marjax does."""
    if "tpu" in platforms:
        return ": pip install 'marjax[tpu]'"
    return ": pip install 'marjax[cuda13]', or cuda12" if re.search("cuda|gpu", platforms) else ""


def _is_of_memory(error: BaseException) -> bool:
    """Whether the host or a device ran out of memory."""
    text = str(error)[:1000]
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("bad_alloc" in text or ("RESOURCE_EXHAUSTED" in text and "memory" in text.lower()))
    )


def _is_of_backend(error: BaseException) -> bool:
    """Whether JAX could not initialize a backend; without its CUDA plugin, an assertion without a message fails."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(error).startswith("Unable to initialize backend") or (
        isinstance(error, AssertionError) and bool(frames) and frames[-1].endswith("jax/_src/xla_bridge.py")
    )


def advice(error: OSError) -> str:
    """How to fix the failure of a file or folder."""
    return _ADVICE.get(error.errno or 0, _PATH)


def error_number(error: BaseException) -> int | None:
    """The errno of an OSError, or of a ValueError that TensorStore raises for one."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error)) if isinstance(error, ValueError) else None
    return int(found[1]) if found else None


def is_passing(error: BaseException) -> bool:
    """Whether reading failed for lack of memory, descriptors or access, so that the file may be intact."""
    return isinstance(error, MemoryError | TimeoutError) or error_number(error) in _PASSING


@functools.cache
def quiet_interpreter() -> None:
    """Keeps Python from printing about event loops that a failure left unfinished; for the command line only."""
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if getattr(unraisable.object, "__qualname__", "") != "BaseEventLoop.__del__":
            usual(unraisable)

    sys.unraisablehook = hook
