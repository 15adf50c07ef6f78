"""Memory of a device: how much is available, what a program needs, and what to lower where that does not suffice.

A program is compiled before it first runs, and its needs are compared with what is available: Linux kills a process
that runs out of memory, without a word. Sizes are bytes of one device.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from marjax import distributed, progress
from marjax.errors import UserError
from marjax.host_memory import gib, host_available

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Batch(NamedTuple):
    """What memory grows with.

    Attributes:
      field: that a user sets, such as "config.train.batch_size".
      size: its value, images.
      step: it must remain a multiple of this.
      fixed: bytes that do not depend on it, as far as they are known, besides a program's arguments.
      others: advice besides a lower size, from the largest size that fits, such as "set config.model.remat=full".
    """

    field: str
    size: int
    step: int = 1
    fixed: float = 0.0
    others: Callable[[int], list[str]] = lambda most: []


class Need(NamedTuple):
    """What a program needs: bytes of its arguments, and besides."""

    arguments: float
    temporaries: float


class DoesNotFitError(UserError):
    """A program that needs more memory than there is. If it spans several processes, all raise this."""


class Checked:
    """A jitted function that is compiled and checked for every new shape of its arguments before it runs.

    Its arguments are on the devices already: only what it needs besides has to be available. A program over several
    processes is refused on all of them if it does not fit on one.

    Attributes:
      compiled: the programs, by the structure, shapes and shardings of their arguments.
    """

    def __init__(self, program: Any, what: str, batch: Callable[..., Batch | None] = lambda *_: None) -> None:
        """Args:
        program: made by `jax.jit`.
        what: a name for it, such as "the sampler".
        batch: what memory grows with, from the arguments; None if users cannot set it.
        """
        self.program, self.what, self.batch = program, what, batch
        self.compiled: dict[Any, jax.stages.Compiled] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The program's result. Raises DoesNotFitError."""
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple((np.shape(leaf), _dtype(leaf), getattr(leaf, "sharding", None)) for leaf in leaves)
        if key not in self.compiled:
            compiled, problem = compile_checked(
                self.program, *arguments, what=self.what, batch=self.batch(*arguments), resident=True
            )
            if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
                problem = distributed.agree(problem)
            if problem:
                raise DoesNotFitError(problem)
            self.compiled[key] = compiled
        return self.compiled[key](*arguments)


def compile_checked(
    program: Any, *arguments: Any, what: str, batch: Batch | None, resident: bool = False, freed: float = 0.0
) -> tuple[Any, str]:
    """The compiled program, and in one line why it does not fit, or "".

    Args:
      program: made by `jax.jit`.
      *arguments: arrays, or ShapeDtypeStructs with shardings.
      what: a name for it, such as "the train step".
      batch: what memory grows with, if users can set it.
      resident: whether the arguments are on the devices already.
      freed: bytes of a device that are in use now and will be free when the program runs.
    """
    limit = available() + freed
    with progress.compiling(what):
        lowered = program.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (found := needed_and_usable(str(error))) is None:
                raise
            held = held_by(arguments)
            return None, problem(what, Need(held, found[0] - held), found[1], batch)
    return compiled, problem_of(compiled, what, batch, limit, resident)


def problem_of(
    compiled: jax.stages.Compiled, what: str, batch: Batch | None, limit: float, resident: bool = False
) -> str:
    """What `compile_checked` says of a compiled program, given the bytes that were available before."""
    stats = compiled.memory_analysis()
    if stats is None:
        return ""
    need = Need(
        stats.argument_size_in_bytes,
        max(stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
        + stats.generated_code_size_in_bytes,
    )
    return problem(what, need, limit + (need.arguments if resident else 0.0), batch)


def problem(what: str, need: Need, limit: float, batch: Batch | None = None) -> str:
    """In one line why something does not fit into `limit` bytes and what to lower, or "" where it does.

    The advice takes for granted that memory grows evenly with the batch.
    """
    needed = need.arguments + need.temporaries
    if needed <= limit:
        return ""
    text = (
        f"{what} needs {_size(needed)} of memory, but {_size(max(limit, 0.0))} is available "
        f"({_size(need.arguments)} for its arguments, such as parameters and optimizer, {_size(need.temporaries)} "
        f"for activations and other intermediate values); "
    )
    if batch is None:
        return text + "free memory, or use a machine or devices with more"
    fixed = min(need.arguments + batch.fixed, needed)
    most = int(batch.size * max(limit - fixed, 0.0) / max(needed - fixed, 1.0))
    most = _rounded(min(most, batch.size - 1), batch.step)
    advice = [f"lower {batch.field} from {batch.size} to {most}"] if most else []
    if limit > fixed:
        advice += batch.others(most)
    return text + " or ".join(advice or ["use a smaller model, or more memory or devices"])


def _size(size: float) -> str:
    return gib(size) if size >= 0.1 * 2**30 else f"{size / 2**20:.2f} MiB"


def _rounded(size: int, step: int) -> int:
    """The largest of step, 2 step, 4 step, ... that is not above size; 0 where there is none."""
    return step * (1 << (size // step).bit_length() - 1) if size >= step else 0


def held_by(tree: Any) -> int:
    """Bytes of a tree of arrays, or of ShapeDtypeStructs with shardings, on a device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = np.shape(leaf)
        if (sharding := getattr(leaf, "sharding", None)) is not None:
            shape = sharding.shard_shape(shape)
        total += math.prod(shape) * _dtype(leaf).itemsize
    return total


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)


def available() -> float:
    """Bytes that can still be allocated on the device of this process with the fewest; infinity if not known."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return host_available() / len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    return min(each.get("bytes_limit", math.inf) - each.get("bytes_in_use", 0) for each in stats)


def needed_and_usable(message: str) -> tuple[float, float] | None:
    """Bytes that a program needs and bytes that there are, from the message of XLA's compiler for TPUs, or None."""
    size = r"([\d.]+)([KMGT]?)B?"
    found = re.search(rf"required for HLO temporaries \({size}\) exceeds available HBM \({size}\)", message)
    found = found or re.search(rf"in memory space hbm\. Used {size} of {size} hbm", message)
    if not found:
        return None
    return float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
