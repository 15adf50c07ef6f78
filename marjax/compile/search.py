"""Search for the largest batch per device that fits, with few compiles: memory grows linearly with the batch."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from marjax.host_memory import gib

POLICIES = ("none", "dots", "full")  # for backbone and denoiser


@dataclasses.dataclass(frozen=True)
class Found:
    """The largest batch for one remat policy.

    Attributes:
      policy: `config.model.remat` and `config.model.denoiser.remat`.
      batch: images per device, a power of two; 0 if not even one fits.
      needed: bytes of HBM at that batch; for one image if none fits.
      usable: usable bytes.
      more: bytes needed at twice the batch; NaN if not tried.
      result: result of the `Trial` at that batch, or None.
      error: why the search failed, "" if it did not.
    """

    policy: str
    batch: int
    needed: float
    usable: float
    more: float
    result: Any = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Everything but `result`, as JSON values; unknown numbers are null."""
        numbers = {"hbm_bytes": self.needed, "usable": self.usable, "hbm_bytes_of_twice_as_many": self.more}
        if self.error:
            return {"remat": self.policy, "error": self.error}
        return {
            "remat": self.policy,
            "images_a_device": self.batch,
            **{name: None if math.isnan(value) else value for name, value in numbers.items()},
        }


@dataclasses.dataclass(frozen=True)
class Trial:
    """One compilation: bytes needed and usable, whether it fits by the compiler's own verdict, and a result to keep."""

    needed: float
    usable: float
    fits: bool
    result: Any = None


def largest_batch(policy: str, compile_at: Callable[[int], Trial], start: int, fixed: float, most: int = 1024) -> Found:
    """Finds the largest power of two that fits.

    Args:
      policy: recorded in the result.
      compile_at: compiles for a number of images per device.
      start: first number to try.
      fixed: estimate of the bytes that do not depend on the batch, used for the first guess.
      most: largest number to try.
    """
    trials: dict[int, Trial] = {}

    def at(batch: int) -> Trial:
        if batch not in trials:
            trials[batch] = compile_at(batch)
        return trials[batch]

    batch = _power(start)
    first = at(batch)
    slope = max(first.needed - fixed, 1.0) / batch
    batch = min(most, max(1, _power(int((first.usable - fixed) / slope))))
    while at(batch).fits and batch < most and at(2 * batch).fits:
        batch *= 2
    while batch and not at(batch).fits:
        batch //= 2
    if not batch:
        return Found(policy, 0, at(1).needed, first.usable, math.nan)
    more = at(2 * batch).needed if batch < most else math.nan
    return Found(policy, batch, at(batch).needed, at(batch).usable, more, at(batch).result)


def table(found: Sequence[Found]) -> str:
    """Returns a table with one line per policy."""
    lines = ["remat  images per device  needs        twice as many need     usable"]
    for each in found:
        if each.error:
            lines.append(f"{each.policy:5}  {each.error}")
            continue
        needed = gib(each.needed) if each.batch else f"one needs {gib(each.needed)}"
        more = gib(each.more) or ("-" if each.batch else "")
        lines.append(f"{each.policy:5}  {each.batch or 'none':>17}  {needed:11}  {more:>18}  {gib(each.usable):>9}")
    return "\n".join(lines)


def _power(number: int) -> int:
    """Largest power of two that is at most `number`, and at least 1."""
    return 1 << (max(1, number).bit_length() - 1)
