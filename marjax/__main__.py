"""The `marjax` command, also `python -m marjax`: sets up the process, then calls `cli.main`."""

import io
import os
import sys

from marjax import numerics
from marjax.quiet import quiet_libtpu


def main() -> int:
    """Sets up the process, runs the command line and returns the exit code."""
    for name in numerics.clean_environment(os.environ):
        print(f"marjax: {name} is ignored, because it would change results or stop a healthy run", file=sys.stderr)
    # Cache compiled programs, so that resumed runs and repeated sampling start at once. JAX reads this on import.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/marjax/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    quiet_libtpu(os.environ)
    if __name__ != "__main__":  # like the script itself, its child processes must not import from the current folder
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    _restart()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print characters missing from the terminal's encoding as escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        from marjax.cli import main as run
    except KeyboardInterrupt:
        return 130

    return run()


def _restart() -> None:
    """Replaces this process by one with settings that are only read at startup, unless they are set.

    glibc: malloc uses huge pages. A training step on CPU allocates and frees gigabytes, and a third of its time would
    be page faults of 4 KiB pages. The user's own GLIBC_TUNABLES is kept.
    Python: paths are UTF-8 even in an ASCII locale; Orbax and others cannot handle other paths that are not ASCII.

    The new process has the same command line with interpreter options, so that it imports from the same folders.
    """
    settings = {}
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        settings["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        settings["PYTHONUTF8"] = "1"
    if settings and sys.executable:
        os.environ.update(settings)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
