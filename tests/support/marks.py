"""Finds the tests that start processes, from their code: `launch/test.sh --fast` leaves them out."""

import inspect
import multiprocessing
import subprocess
import types
from collections.abc import Iterator
from typing import Any

import pytest
from support import gcs, launchers, processes, slurm

STARTERS = (
    subprocess,
    multiprocessing,
    subprocess.run,
    subprocess.Popen,
    processes.Run,
    processes.run_program,
    gcs.FakeGcs,
    slurm.slurm,
    launchers.tool_venv,
)


def starts_processes(item: pytest.Function) -> bool:
    """Whether the test, one of its fixtures, or a helper of theirs in the tests uses one of STARTERS."""
    fixtures = [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    todo: list[Any] = [item.function, *fixtures]
    seen = set()
    while todo:
        function = inspect.unwrap(todo.pop())
        if isinstance(function, type):
            todo += [member for member in vars(function).values() if inspect.isfunction(member)]
        if not inspect.isfunction(function) or function in seen:
            continue
        seen.add(function)
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if any(value is starter for starter in STARTERS):
                return True
            if getattr(value, "__module__", "").startswith(("test_", "support.")):
                todo.append(value)
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that the code and the functions within it read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
