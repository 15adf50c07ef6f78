"""How much memory a process can still allocate, within the machine, its control groups and its limits."""

import contextlib
import math
import os
import pathlib
import re
import resource
from collections.abc import Iterator

_NONE = 1 << 60  # larger limits mean no limit, as in version 1 of cgroups


def host_available() -> float:
    """Bytes that this process can still allocate, including swap; infinity if unknown."""
    status, machine = _fields("/proc/self/status"), _fields("/proc/meminfo")
    free = [machine["MemAvailable"] + machine.get("SwapFree", 0.0)] if "MemAvailable" in machine else []
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and field in status:
            free.append(most - status[field])
    free += _cgroups()
    if not free:  # not Linux: all memory of the machine
        with contextlib.suppress(OSError, ValueError):
            free.append(float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE"))
    return min(free, default=math.inf)


def _fields(path: str) -> dict[str, float]:
    """Bytes by name from lines such as "MemAvailable:  24016520 kB"; {} if the file does not exist."""
    try:
        text = pathlib.Path(path).read_text()
    except OSError:
        return {}
    return {name: float(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _cgroups(root: str = "/sys/fs/cgroup", process: str = "/proc/self/cgroup") -> Iterator[float]:
    """Bytes left in the control groups of this process and their parents, versions 1 and 2."""
    try:
        lines = pathlib.Path(process).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = pathlib.Path(root), ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = pathlib.Path(root, "memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / names[0]).read_text())  # "max": ValueError
                if most < _NONE:
                    yield most - int((folder / names[1]).read_text()) + _page_cache(folder / "memory.stat", names[2])
            if folder == top:
                break


def _page_cache(path: pathlib.Path, prefix: str) -> int:
    """Bytes of cached files, which the kernel can reclaim."""
    return sum(map(int, re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", path.read_text(), re.MULTILINE)))


def gib(size: float) -> str:
    """ "1.50 GiB" for a number of bytes; "" for NaN."""
    return "" if math.isnan(size) else f"{size / 2**30:.2f} GiB"
