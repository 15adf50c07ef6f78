"""The `marjax` command, also `python -m marjax`: prepares the process, then parses."""

import os
import sys

from marjax import numerics


def main() -> int:
    """Runs the command line in a process that is set up for it."""
    for name in numerics.clean_environment(os.environ):
        print(f"marjax: {name} is ignored: it would change results or stop a healthy run", file=sys.stderr)
    # Compiled programs outlive the process: a resumed run or a second sampling starts at once. JAX reads this when it
    # is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/marjax/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if __name__ != "__main__":  # the script does not import from the current folder: nor do the processes it starts
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    _restart_with_huge_pages()
    try:
        from marjax.cli import main as run
    except KeyboardInterrupt:
        return 130

    return run()


def _restart_with_huge_pages() -> None:
    """Replaces this process by one whose malloc asks for huge pages; glibc reads the setting only at its start.

    A training step on CPU takes and returns gigabytes, and faulting them in by 4 KiB pages costs a third of it.
    A GLIBC_TUNABLES of the user's own is left as it is. The new process has the command line of this one, interpreter
    options included, so that it imports from the same folders.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and sys.executable:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
