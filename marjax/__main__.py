"""The `marjax` command, also `python -m marjax`: prepares the process, then parses."""

import io
import os
import sys

from marjax import numerics
from marjax.quiet import quiet_libtpu


def main() -> int:
    """Runs the command line in a process that is set up for it."""
    for name in numerics.clean_environment(os.environ):
        print(f"marjax: {name} is ignored: it would change results or stop a healthy run", file=sys.stderr)
    # Compiled programs outlive the process: a resumed run or a second sampling starts at once. JAX reads this when it
    # is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/marjax/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    quiet_libtpu(os.environ)
    if __name__ != "__main__":  # the script does not import from the current folder: nor do the processes it starts
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    _restart()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding prints what it cannot show as escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        from marjax.cli import main as run
    except KeyboardInterrupt:
        return 130

    return run()


def _restart() -> None:
    """Replaces this process by one with settings that are read only at its start, unless it has them.

    glibc: malloc asks for huge pages. A training step on CPU takes and returns gigabytes, and faulting them in by 4 KiB
    pages costs a third of it. A GLIBC_TUNABLES of the user's own is left as it is.
    Python: paths are UTF-8 in an ASCII locale too; Orbax and others cannot handle those that are not ASCII otherwise.

    The new process has the command line of this one, interpreter options included, so that it imports from the same
    folders.
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
