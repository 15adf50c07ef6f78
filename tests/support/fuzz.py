"""Seeded fuzzing of readers of foreign files, in processes with limits.

A mutant may be read, or be refused with one line. It may not run code, write elsewhere, take more than 2 GiB or 10 s,
or end the process. Mutant number `index` of a target is a function of (seed, target, index) alone.
"""

import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from support.mutators import CANARY, Mutator, mutate_bytes

from marjax.errors import TrainingError, UserError

MEMORY = 2 << 30  # bytes that a reader may take
CPU_SECONDS, SECONDS = 10, 120  # of one mutant
BATCH = 250  # mutants a process


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader and the files it reads.

    Attributes:
      name: also the folder of its sound files.
      files: patterns of those to mutate, one at a time.
      mutate: makes one of them another.
      read: reads a folder that has them.
      share: of all mutants, relative to the other targets.
      refusals: what `read` may raise beside UserError and TrainingError.
      alone: whether each of `files` is read by itself, without the others.
    """

    name: str
    files: tuple[str, ...]
    mutate: Mutator
    read: Callable[[pathlib.Path], Any]
    share: float = 1.0
    refusals: tuple[type[BaseException], ...] = ()
    alone: bool = False


def counts(targets: list[Target], total: int) -> dict[str, int]:
    """How many mutants of each target."""
    whole = sum(target.share for target in targets)
    return {target.name: round(total * target.share / whole) for target in targets}


def run(targets: list[Target], root: pathlib.Path, total: int, seed: int) -> dict[str, Any]:
    """Reads mutants of the files in `root/<target>`.

    Returns:
      By target: how many "works" and "refused", the "seconds", and "failures", each with the mutant and what it did.
    """
    report = {}
    with tempfile.TemporaryDirectory() as scratch:
        for target in targets:
            made: dict[str, Any] = {"works": 0, "refused": 0, "failures": []}
            start, index, last = time.monotonic(), 0, counts(targets, total)[target.name]
            while index < last and len(made["failures"]) < 50:
                index = _batch(target, root, scratch, seed, index, min(last, index + BATCH), made)
            report[target.name] = made | {"seconds": round(time.monotonic() - start, 1)}
    return report


def mutant(target: Target, root: pathlib.Path, seed: int, index: int, folder: pathlib.Path) -> str:
    """Makes a mutant's folder; returns the name of the file that differs."""
    rng = random.Random(f"{seed}/{target.name}/{index}")
    shutil.copytree(root / target.name, folder, dirs_exist_ok=True)
    found = sorted({path for pattern in target.files for path in folder.glob(pattern) if path.is_file()})
    path = rng.choice(found)
    for other in found if target.alone else ():
        if other != path:
            other.unlink()
    data = path.read_bytes()
    try:
        data = target.mutate(data, rng)
    except Exception:  # an edit that the format cannot hold, or none of that format any more
        data = mutate_bytes(data, rng)
    path.write_bytes(data)
    return str(path.relative_to(folder))


def _batch(
    target: Target, root: pathlib.Path, scratch: str, seed: int, first: int, last: int, made: dict[str, Any]
) -> int:
    """Reads some mutants in a process of its own, counts how they went, and returns the index of the next."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _read_all(target, root, scratch, seed, first, last, writing)
        finally:
            os._exit(99)
    os.close(writing)
    with os.fdopen(reading) as lines:
        begun = ""
        for line in lines:
            index, name, outcome = json.loads(line)
            begun = "" if outcome else name
            first = index + 1
            if outcome in ("works", "refused"):
                made[outcome] += 1
            elif outcome:
                made["failures"].append({"index": index, "file": name, "what": outcome})
    _, status = os.waitpid(child, 0)
    if begun or status:
        code = os.waitstatus_to_exitcode(status)
        what = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended the process with {code}"
        made["failures"].append({"index": first - 1, "file": begun, "what": what})
        return max(first, 1)
    return last


def _read_all(target: Target, root: pathlib.Path, scratch: str, seed: int, first: int, last: int, report: int) -> None:
    """The process of a batch; does not return."""
    quiet = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)
    for number, action in ((signal.SIGPROF, signal.SIG_DFL), (signal.SIGALRM, signal.SIG_DFL)):
        signal.signal(number, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = pathlib.Path(scratch, "mutant")
    ran: list[str] = []
    armed, writes = False, os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not armed:
            return
        if event in (
            "os.system",
            "subprocess.Popen",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "pickle.find_class",
            "socket.connect",
        ) or (event == "import" and arguments[0] == CANARY):
            ran.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str) and arguments[2] & writes:
            path = os.path.realpath(arguments[0])
            if not path.startswith((os.path.realpath(scratch), "/dev/", "/proc/")):
                ran.append(f"writes {path}")

    sys.addaudithook(audit)
    for index in range(first, last):
        shutil.rmtree(folder, ignore_errors=True)
        name = mutant(target, root, seed, index, folder)
        os.write(report, (json.dumps([index, name, ""]) + "\n").encode())
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        armed = True
        outcome = outcome_of(target, folder)
        armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        outcome = f"ran code: {ran}" if ran else outcome
        os.write(report, (json.dumps([index, name, outcome]) + "\n").encode())
        ran.clear()
    os._exit(0)


def outcome_of(target: Target, folder: pathlib.Path) -> str:
    """ "works", "refused", or what else happened."""
    try:
        target.read(folder)
        return "works"
    except BaseException as error:
        if not isinstance(error, (UserError, TrainingError, *target.refusals)):
            return traceback.format_exc()[-3000:]
        text = str(error)
        return "refused" if text and len(text.splitlines()) == 1 else f"no line: {text!r:.300}"


def summary(report: dict[str, Any]) -> str:
    """A line for each target, then the failures."""
    lines = [
        f"{name:<20} {made['works']:>6} read {made['refused']:>6} refused {len(made['failures']):>4} failed "
        f"{made['seconds']:>6} s"
        for name, made in report.items()
    ]
    total = Counter[str]()
    for made in report.values():
        total.update(read=made["works"], refused=made["refused"], failed=len(made["failures"]))
    lines.append(f"{sum(total.values())} mutants: " + ", ".join(f"{count} {name}" for name, count in total.items()))
    for name, made in report.items():
        lines += [f"--- {name} {each['index']} ({each['file']})\n{each['what']}" for each in made["failures"]]
    return "\n".join(lines)
