"""Failures of the machine (memory, disk, limits) in one line."""

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

TRACEBACK = "MARJAX_TRACEBACK"  # set to anything, the command line prints tracebacks too

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
# A damaged file fails otherwise: these say that it may well be whole.
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


# What to lower where a command runs out of memory.
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
    """What a failure of the machine comes to, in one line with what to do; None if the error is something else.

    Args:
      error: any exception.
      command: during which it was raised, such as "train".
    """
    if _is_of_memory(error):
        device = "" if isinstance(error, MemoryError) else " on the device"
        detail = shortened(" ".join(str(error).split()), 160)
        return TrainingError(
            f"out of memory{device}{f' ({detail})' if detail else ''}; "
            f"{gib(max(host_available(), 0.0))} of this machine's is available now; "
            f"{_LOWER.get(command, 'use a smaller batch')}, or use more devices or memory"
        )
    if isinstance(error, RecursionError):
        return TrainingError(
            f"something is nested too deeply ({shortened(str(error))}); simplify the config or file, "
            f"or set {TRACEBACK}=1 to see where"
        )
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return TrainingError("no more threads can be started; allow more processes (ulimit -u)")
    if isinstance(error, RuntimeError | AssertionError) and _is_of_backend(error):
        detail = shortened(" ".join(str(error).split()), 160)
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return TrainingError(
            f"JAX finds no devices of JAX_PLATFORMS={platforms}"
            f"{f' ({detail})' if detail else ''}; set it to what this machine has, such as cpu, or "
            f"install JAX for it{_installs(platforms)}"
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
    """The command that installs JAX for an accelerator, after a colon; "" if no extra of marjax does."""
    if "tpu" in platforms:
        return ": pip install 'marjax[tpu]'"
    return ": pip install 'marjax[cuda13]', or cuda12" if re.search("cuda|gpu", platforms) else ""


def _is_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a device did not suffice."""
    text = str(error)[:1000]
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("bad_alloc" in text or ("RESOURCE_EXHAUSTED" in text and "memory" in text.lower()))
    )


def _is_of_backend(error: BaseException) -> bool:
    """Whether JAX could not start its devices. Without JAX's plugin for CUDA this is an assertion without a word."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(error).startswith("Unable to initialize backend") or (
        isinstance(error, AssertionError) and bool(frames) and frames[-1].endswith("jax/_src/xla_bridge.py")
    )


def advice(error: OSError) -> str:
    """What to do about the failure of a file or folder."""
    return _ADVICE.get(error.errno or 0, _PATH)


def error_number(error: BaseException) -> int | None:
    """The errno of an OSError, or of TensorStore's ValueError that stands for one."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error)) if isinstance(error, ValueError) else None
    return int(found[1]) if found else None


def is_passing(error: BaseException) -> bool:
    """Whether reading failed for want of memory, descriptors or access, which says nothing about what was read."""
    return isinstance(error, MemoryError | TimeoutError) or error_number(error) in _PASSING


@functools.cache
def quiet_interpreter() -> None:
    """Leaves out what Python prints of event loops that a failure has left unfinished, in a process of ours."""
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if getattr(unraisable.object, "__qualname__", "") != "BaseEventLoop.__del__":
            usual(unraisable)

    sys.unraisablehook = hook
