"""The commands and flags of the installed gcloud, from what it has for a shell's completion: nothing is asked."""

import functools
import pathlib
import runpy
import shutil
from collections.abc import Sequence
from typing import Any

import pytest


@functools.cache
def _tree() -> dict[str, Any]:
    program = shutil.which("gcloud")
    if program is None:
        pytest.skip("gcloud is not installed")
    file = pathlib.Path(program).resolve().parent.parent / "data" / "cli" / "gcloud_completions.py"
    if not file.exists():
        pytest.skip(f"this gcloud has no {file.name}")
    tree: dict[str, Any] = runpy.run_path(str(file))["STATIC_COMPLETION_CLI_TREE"]
    return tree


def unknown(arguments: Sequence[str]) -> set[str]:
    """Of a call, the flags that its command has not; the call, if there is no such command. Skips without gcloud."""
    node, known = _tree(), set(_tree()["flags"])
    for word in arguments:
        if word not in node.get("commands", {}):
            break
        node = node["commands"][word]
        known |= set(node.get("flags", {}))
    if node.get("commands"):
        return {" ".join(arguments)}
    return {word.split("=")[0] for word in arguments if word.startswith("--")} - known
