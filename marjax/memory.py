"""Device memory: how much is available, how much a program needs, and what to lower if that is too much.

A program is compiled and its memory compared with what is available before it first runs, since Linux kills a process
that runs out of memory without a message. Sizes are bytes per device.
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
    """The batch size that a program's memory grows with.

    Attributes:
      field: the setting, such as "config.train.batch_size".
      size: its value, in images.
      step: the size must be a multiple of this.
      fixed: known bytes that do not depend on the size, besides the program's arguments.
      others: more advice, given the largest size that fits, such as "set config.model.remat=full".
    """

    field: str
    size: int
    step: int = 1
    fixed: float = 0.0
    others: Callable[[int], list[str]] = lambda most: []


class Need(NamedTuple):
    """Memory of a program: bytes of its arguments, and of everything else."""

    arguments: float
    temporaries: float


class DoesNotFitError(UserError):
    """A program needs more memory than is available; raised on all processes that run it."""


class Checked:
    """A jitted function whose memory is checked before it runs, for every new shape of its arguments.

    Arguments are on the devices already, so only the remaining memory is checked. A program that spans processes is
    refused on all if it does not fit on one.

    Attributes:
      compiled: compiled programs by the structure, shapes and shardings of their arguments.
    """

    def __init__(self, program: Any, what: str, batch: Callable[..., Batch | None] = lambda *_: None) -> None:
        """Args:
        program: a jitted function.
        what: its name in messages, such as "the sampler".
        batch: from the arguments, the batch size that memory grows with; None if users cannot set it.
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
    """Compiles a program; returns it, and one line that says why it does not fit, or "".

    Args:
      program: a jitted function.
      *arguments: arrays, or ShapeDtypeStructs with shardings.
      what: its name in messages, such as "the train step".
      batch: the batch size that memory grows with, if users can set it.
      resident: whether the arguments are on the devices already.
      freed: bytes per device that are in use now and will be free when the program runs.
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
    """One line that says why a compiled program does not fit in the bytes available before, or ""."""
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
    """One line that says why something does not fit into `limit` bytes and what to lower, or "" if it fits.

    The advice assumes that memory grows linearly with the batch size.
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
    """The largest of step, 2 step, 4 step, ... up to size; 0 if there is none."""
    return step * (1 << (size // step).bit_length() - 1) if size >= step else 0


def held_by(tree: Any) -> int:
    """Bytes per device of a tree of arrays, or of ShapeDtypeStructs with shardings."""
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
    """The fewest bytes that can still be allocated on a device of this process; infinity if unknown."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return host_available() / len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    return min(each.get("bytes_limit", math.inf) - each.get("bytes_in_use", 0) for each in stats)


def needed_and_usable(message: str) -> tuple[float, float] | None:
    """Bytes that a program needs and that are usable, from an error message of XLA's TPU compiler; None for others."""
    size = r"([\d.]+)([KMGT]?)B?"
    found = re.search(rf"required for HLO temporaries \({size}\) exceeds available HBM \({size}\)", message)
    found = found or re.search(rf"in memory space hbm\. Used {size} of {size} hbm", message)
    if not found:
        return None
    return float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
