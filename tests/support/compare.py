"""Comparisons: parity files, relative errors, states that are equal to the bit."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from support.paths import PARITY


def parity(name: str) -> tuple[Any, dict[str, Any]]:
    """The arrays of a parity file and its config."""
    arrays = np.load(PARITY / f"{name}.npz")
    return arrays, json.loads(str(arrays["config"])) if "config" in arrays.files else {}


def relative_error(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit."""
    structures: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    assert structures[0] == structures[1]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics of every step, without those that time."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "data/"))} for row in rows]
